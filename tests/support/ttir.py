"""What Triton's intermediate representation of a kernel says of its addresses."""

from __future__ import annotations

import re
from collections import ChainMap

_NAME = re.compile(r"%(\w+)")
_LOOP = re.compile(r"scf\.for %(\w+) = (%\w+) to %\w+ step (%\w+)(?: iter_args\((.*?)\) ->)?")
_PRODUCT_IN_INT32 = re.compile(r"arith\.(?:muli|shli) .*: (?:i32|tensor<[\dx]+xi32>)$")


def int32_products(ttir: str) -> int:
    """Products of a program id, a loop variable or a loaded number that are formed in 32 bits for an address.

    One that is extended to 64 bits afterward counts, for it has overflowed by then. Products with a block
    size are harmless, as they give the index of a token or of a column; those with a stride overflow in a
    tensor of more than 2**31 elements.
    """
    operands: list[set[int]] = []  # of what each value is made
    values: ChainMap[str, int] = ChainMap()  # by their names, which regions that lie side by side share
    indices: set[int] = set()
    products: set[int] = set()
    offsets: set[int] = set()
    closed: set[int] = set()
    regions: list[set[int]] = []  # the results that a yield in each open region gives

    def define(name: str, made_of: set[int]) -> int:
        values[name] = len(operands)
        operands.append(made_of)
        return values[name]

    def used_in(text: str) -> set[int]:
        return {values[name] for name in _NAME.findall(text) if name in values}

    for line in ttir.splitlines():
        line = re.sub(r" loc\(.*", "", line).strip()
        names, _, expression = line.partition(" = ") if line.startswith("%") else ("", "", line)
        if line.startswith("}"):
            values = values.parents
            closed = regions.pop()
        if expression.startswith("scf.yield"):
            for result in regions[-1]:
                operands[result] |= used_in(expression)
        elif expression.startswith("tt.addptr"):
            offsets |= used_in(expression.split(",")[1].partition(":")[0])

        loop = _LOOP.match(expression)
        if loop:
            made_of = used_in(loop[4] or "")
        elif expression.startswith(("tt.get_program_id", "tt.load", "arith.cmpi")):
            made_of = set()  # what is loaded from where is another address, and a mask is no part of one
        else:
            made_of = used_in(expression)
        results = {define(name, set(made_of)) for name in _NAME.findall(names)}
        if expression.startswith(("tt.get_program_id", "tt.load")):
            indices |= results
        if _PRODUCT_IN_INT32.match(expression):
            products |= results

        if line.endswith("{") or line.startswith("tt.func"):
            values = values.new_child()
            regions.append(closed if line.startswith("}") else results)  # an else gives what its if gives
        if loop:
            bounds, carried = used_in(f"{loop[2]} {loop[3]}"), loop[4] or ""
            indices.add(define(loop[1], bounds))
            for argument, initial in re.findall(r"(%\w+) = (%\w+)", carried):
                define(argument[1:], used_in(initial) | results)

    def origins(found: set[int]) -> set[int]:
        """`found` and all that they are made of."""
        waiting = list(found)
        found = set(found)
        while waiting:
            new = operands[waiting.pop()] - found
            found |= new
            waiting.extend(new)
        return found

    return sum(bool(origins({product}) & indices) for product in products & origins(offsets))
