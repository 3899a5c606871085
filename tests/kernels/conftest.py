from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_memory

    interpreter_memory.install()
