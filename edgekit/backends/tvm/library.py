"""What a bundle holds for the machine code to be used: libraries, headers, and classes for other languages."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

from elftools.elf.elffile import ELFFile

from edgekit.backends.tvm import driver, link
from edgekit.backends.tvm.driver import Interface, Sources
from edgekit.backends.tvm.link import System

# Of ELF's records for 64 bits: a symbol begins with its name, and a section header has these two at byte 24.
_NAME = struct.Struct("<I")
_OFFSET_AND_SIZE = struct.Struct("<QQ")
_SH_OFFSET = 24


def write_sources(sources: Sources, interface: Interface, work: Path) -> None:
    """Write what a library is compiled from into `work`."""
    (work / "weights.bin").write_bytes(sources.weights)
    for name, text in {interface.header: sources.header, **sources.code}.items():
        (work / name).write_text(text, encoding="utf-8")
    shutil.copyfile(driver.C_FOLDER / "memory.c", work / "memory.c")


def compile_sources(work: Path, zig_target: str) -> list[Path]:
    """Return the object files of the library's own code, compiled in `work`, without what a libc has."""
    return [link.compile_c(work / name, zig_target) for name in driver.CODE]


def archive(objects: Sequence[Path], interface: Interface, work: Path) -> Path:
    """Return a static library of one object in which only the public functions keep their names.

    Names that are hidden in a shared library are not in a static one, and two models have kernels of the same name; so
    each gets the model's name in front.
    """
    whole = work / f"edgekit_{interface.model}.o"
    link.link_object(objects, whole)
    _rename(whole, f"edgekit_{interface.model}__", frozenset(interface.symbols))
    return link.archive(whole, work / interface.archive)


def link_denoiser(static: Path, sources: Sources, interface: Interface, system: System, work: Path) -> Path:
    """Return the command-line denoiser, a static program that needs nothing of the system but its kernel."""
    (work / "denoise.c").write_text(driver.render("denoise.c.j2", sources), encoding="utf-8")
    program = work / interface.program
    link.compile_program(work / "denoise.c", program, f"{system.zig.partition('-')[0]}-linux-musl", static)
    return program


def deliver(
    library: Path, static: Path, program: Path | None, sources: Sources, interface: Interface, system: System, out: Path
) -> dict[str, str]:
    """Write the finished files into `out`; returns role -> path in it."""
    name = interface.prefix
    texts = {"header": (f"include/{interface.header}", sources.header)}
    binaries = {"artifact": (f"{system.folder}/{library.name}", library)}
    if system.api is not None:
        texts["cmake"] = (f"cmake/{name}.cmake", driver.render("package.cmake.j2", sources))
        for role, kotlin in (("kotlin", "Denoiser"), ("kotlin_bytes", "ByteDenoiser")):
            texts[role] = (f"kotlin/{name}/{kotlin}.kt", driver.render(f"{kotlin}.kt.j2", sources))
        binaries["static"] = (f"static/arm64-v8a/{static.name}", static)
    else:
        texts["python"] = (f"{system.folder}/{name}.py", driver.render("edgekit.py.j2", sources))
        binaries["static"] = (f"{system.folder}/{static.name}", static)
    if program is not None:
        binaries["program"] = (f"bin/{program.name}", program)
        binaries["licence_musl"] = ("licences/musl.txt", link.musl_licence())
    for path, text in texts.values():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text, encoding="utf-8")
    for path, file in binaries.values():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / path)
    if program is not None:
        (out / binaries["program"][0]).chmod(0o755)
    return {role: path for role, (path, _) in sorted({**texts, **binaries}.items())}


def _rename(path: Path, prefix: str, kept: frozenset[str]) -> None:
    """Put `prefix` in front of every global name that an object file defines, but those in `kept`.

    The object gets a string table at its end that has the old one's names and, after them, the new ones.
    """
    content = bytearray(path.read_bytes())
    with path.open("rb") as stream:
        file = ELFFile(stream)
        symbols = file.get_section_by_name(".symtab")
        table = symbols["sh_link"]
        names = bytearray(file.get_section(table).data())
        header = file["e_shoff"] + table * file["e_shentsize"]
        for number, symbol in enumerate(symbols.iter_symbols()):
            defined = symbol.entry.st_shndx != "SHN_UNDEF" and symbol.entry.st_info.bind != "STB_LOCAL"
            if defined and symbol.name not in kept:
                _NAME.pack_into(content, symbols["sh_offset"] + number * symbols["sh_entsize"], len(names))
                names += f"{prefix}{symbol.name}\0".encode()
    _OFFSET_AND_SIZE.pack_into(content, header + _SH_OFFSET, len(content), len(names))
    path.write_bytes(bytes(content + names))
