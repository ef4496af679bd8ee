"""What a processor must have to run a library: told by the compiler, asked for by the library when it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm

from edgekit.backends.tvm.kernels import target_of
from edgekit.errors import UnsupportedError
from edgekit.target import Isa

# LLVM's name of a feature -> bits of the words that tell of it.
# linux/arch/arm64/include/uapi/asm/hwcap.h: AT_HWCAP, AT_HWCAP2. Every arm64 processor with Linux has fp and asimd.
_AARCH64: Mapping[str, tuple[int, int]] = {
    "aes": (1 << 3 | 1 << 4, 0),
    "sha2": (1 << 5 | 1 << 6, 0),
    "crc": (1 << 7, 0),
    "lse": (1 << 8, 0),
    "fullfp16": (1 << 9 | 1 << 10, 0),
    "rdm": (1 << 12, 0),
    "jsconv": (1 << 13, 0),
    "complxnum": (1 << 14, 0),
    "rcpc": (1 << 15, 0),
    "sha3": (1 << 17 | 1 << 21, 0),
    "dotprod": (1 << 20, 0),
    "sve": (1 << 22, 0),
    "fp16fml": (1 << 23, 0),
    "flagm": (1 << 27, 0),
    "sve2": (0, 1 << 1),
    "i8mm": (0, 1 << 13),
    "bf16": (0, 1 << 14),
    "cssc": (0, 1 << 34),
    "mops": (0, 1 << 43),
    "faminmax": (0, 1 << 50),
}
# Intel's manual, volume 2, CPUID: leaf 1 ECX, leaf 7 EBX, leaf 7 ECX; and what XCR0 must show that the system saves.
_AVX, _AVX512 = 0x6, 0xE6
_X86_64: Mapping[str, tuple[int, int, int, int]] = {
    "sse3": (1, 0, 0, 0),
    "ssse3": (1 << 9, 0, 0, 0),
    "fma": (1 << 12, 0, 0, _AVX),
    "sse4.1": (1 << 19, 0, 0, 0),
    "sse4.2": (1 << 20, 0, 0, 0),
    "movbe": (1 << 22, 0, 0, 0),
    "popcnt": (1 << 23, 0, 0, 0),
    "avx": (1 << 28, 0, 0, _AVX),
    "f16c": (1 << 29, 0, 0, _AVX),
    "bmi": (0, 1 << 3, 0, 0),
    "avx2": (0, 1 << 5, 0, _AVX),
    "bmi2": (0, 1 << 8, 0, 0),
    "avx512f": (0, 1 << 16, 0, _AVX512),
    "avx512dq": (0, 1 << 17, 0, _AVX512),
    "avx512ifma": (0, 1 << 21, 0, _AVX512),
    "avx512cd": (0, 1 << 28, 0, _AVX512),
    "avx512bw": (0, 1 << 30, 0, _AVX512),
    "avx512vl": (0, 1 << 31, 0, _AVX512),
    "avx512vbmi": (0, 0, 1 << 1, _AVX512),
    "avx512vbmi2": (0, 0, 1 << 6, _AVX512),
    "gfni": (0, 0, 1 << 8, 0),
    "vaes": (0, 0, 1 << 9, _AVX),
    "vpclmulqdq": (0, 0, 1 << 10, _AVX),
    "avx512vnni": (0, 0, 1 << 11, _AVX512),
    "avx512bitalg": (0, 0, 1 << 12, _AVX512),
    "avx512vpopcntdq": (0, 0, 1 << 14, _AVX512),
}
_BITS: Mapping[str, Mapping[str, tuple[int, ...]]] = {"aarch64": _AARCH64, "x86_64": _X86_64}
_WORDS = {"aarch64": 2, "x86_64": 4}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Features that every processor must have that runs a library.

    features: LLVM's names, sorted.
    words: The same as bits, as api.c asks for them: AT_HWCAP and AT_HWCAP2, or three words of CPUID and one of XCR0.
    """

    family: str
    features: tuple[str, ...]
    words: tuple[int, ...]

    @property
    def text(self) -> str:
        """What to add to a message."""
        return f": {' '.join(self.features)}" if self.features else ""


def needs(isa: Isa, features: Sequence[str]) -> Needs:
    """Return what machine code for an instruction set, with those features more, may not be without.

    Raises:
        UnsupportedError: A feature that the library could not ask a processor for; or as `target_of`.
    """
    target = target_of(isa, *features)
    family = isa.triple.partition("-")[0]
    known = _BITS[family]
    named = {feature.lstrip("+") for feature in (*isa.features, *features) if not feature.startswith("-")}
    if foreign := sorted(named - set(known) - {"neon", "fp-armv8", "sse", "sse2"}):
        raise UnsupportedError(
            f"isa.features: the library cannot ask a processor for {', '.join(foreign)}",
            remedy=f"known: {', '.join(sorted(known))}",
        )
    # A named core brings features along; LLVM also lists what code of ours cannot use, as system registers.
    asked = tvm.get_global_func("target.llvm_get_cpu_features")(target)
    found = tuple(sorted(set(known) & {str(feature) for feature in asked}))
    words = [0] * _WORDS[family]
    for feature in found:
        words = [word | bits for word, bits in zip(words, known[feature], strict=True)]
    return Needs(family=family, features=found, words=tuple(words))
