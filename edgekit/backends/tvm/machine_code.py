"""Which kernels of an object file multiply integers: told from their machine code, not from what was asked for.

Encodings: Arm Architecture Reference Manual for A-profile, C4.1 "A64 instruction set encoding"; Intel 64 and IA-32
Architectures Software Developer's Manual, volume 2, VPDPBUSD, TDPBUSD, 2.3.5 "The VEX prefix" and 2.7.1 "Instruction
format and EVEX".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from elftools.elf.elffile import ELFFile

# mnemonic -> (mask, value) of its 32 bits; of each, all vector forms that a compiler may choose
_A64: Mapping[str, tuple[tuple[int, int], ...]] = {
    "sdot": ((0xBFE0FC00, 0x0E809400), (0xBFC0F400, 0x0F80E000)),
    "smull": ((0xBF20FC00, 0x0E20C000),),
    "smlal": ((0xBF20FC00, 0x0E208000),),
    "fmla": ((0xBFA0FC00, 0x0E20CC00), (0xBF80F400, 0x0F801000)),
}
# EVEX.512.66.0F38.W0 50, any registers, memory operand and mask
_VPDPBUSD = re.compile(
    rb"\x62[\x02\x12\x22\x32\x42\x52\x62\x72\x82\x92\xa2\xb2\xc2\xd2\xe2\xf2][\x05-\x7d][\x40-\x5f]\x50", re.DOTALL
)
# VEX.128.66.0F38.W0 5E, three tiles
_TDPBUSD = re.compile(rb"\xc4\xe2[\x41\x49\x51\x59\x61\x69\x71\x79]\x5e[\xc0-\xff]", re.DOTALL)
_MULTIPLIES = {
    "dotprod": ("sdot",),
    "neon": ("smull", "smlal"),
    "vnni": ("vpdpbusd",),
    "amx": ("tdpbusd", "vpdpbusd"),
}


def integer_kernels(object_file: Path, machine: str) -> frozenset[str]:
    """Return the functions of an object file that multiply by that machine's instructions more than they do in float.

    The kernel that writes the picture is among them: it has a few multiply-adds in float at its end.
    """
    return frozenset(
        name
        for name, found in instruction_counts(object_file).items()
        if sum(found[mnemonic] for mnemonic in _MULTIPLIES[machine]) > found["fmla"]
    )


def instruction_counts(object_file: Path) -> dict[str, Counter[str]]:
    """Return how often each function of an object file has each of the instructions that matter here."""
    with object_file.open("rb") as stream:
        file = ELFFile(stream)
        count: Callable[[bytes], Counter[str]] = _count_a64 if file.header.e_machine == "EM_AARCH64" else _count_x86
        counts: dict[str, Counter[str]] = {}
        for symbol in file.get_section_by_name(".symtab").iter_symbols():
            if symbol.entry.st_info.type != "STT_FUNC" or symbol.entry.st_shndx == "SHN_UNDEF":
                continue
            start, size = symbol.entry.st_value, symbol.entry.st_size
            code = file.get_section(symbol.entry.st_shndx).data()[start : start + size]
            counts[symbol.name] = count(code)
    return counts


def _count_a64(code: bytes) -> Counter[str]:
    words = np.frombuffer(code[: len(code) // 4 * 4], "<u4")
    return Counter(
        {
            mnemonic: sum(int(np.count_nonzero((words & mask) == value)) for mask, value in forms)
            for mnemonic, forms in _A64.items()
        }
    )


def _count_x86(code: bytes) -> Counter[str]:
    return Counter({"vpdpbusd": len(_VPDPBUSD.findall(code)), "tdpbusd": len(_TDPBUSD.findall(code))})
