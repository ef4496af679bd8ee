"""What a device tells of itself, by one script for its shell. No serial numbers, no host names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgekit.measure import host

# For any POSIX shell: Android's mksh with toybox, a board's dash. What cannot be read is left empty.
SCRIPT = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
first() { cat "$1" 2>/dev/null | tr -d '\0' | head -n 1; }
say machine "$(uname -m)"
say kernel "$(uname -r)"
if command -v getprop >/dev/null 2>&1; then
    say model "$(getprop ro.product.manufacturer) $(getprop ro.product.model)"
    say soc "$(getprop ro.soc.manufacturer) $(getprop ro.soc.model)"
    say board "$(getprop ro.board.platform)"
    say android "$(getprop ro.build.version.release)"
    say api "$(getprop ro.build.version.sdk)"
    say emulator "$(getprop ro.boot.qemu)$(getprop ro.kernel.qemu)"
else
    say model "$(first /proc/device-tree/model)"
    say soc "$(first /proc/device-tree/compatible)"
    say system "$(. /etc/os-release 2>/dev/null; printf '%s' "$PRETTY_NAME")"
fi
for core in /sys/devices/system/cpu/cpu[0-9]*; do
    [ -d "$core" ] || continue
    say core "${core##*/cpu} $(first "$core/cpufreq/cpuinfo_min_freq") \
$(first "$core/cpufreq/cpuinfo_max_freq") $(first "$core/cpufreq/scaling_governor")"
done
for zone in /sys/class/thermal/thermal_zone*; do
    [ -d "$zone" ] && say zone "$(first "$zone/type") $(first "$zone/temp")"
done
echo cpuinfo
cat /proc/cpuinfo 2>/dev/null
"""
_CPU_ZONE = re.compile(r"cpu|soc|tsens|cluster|big|little", re.IGNORECASE)
# arch/arm64/include/uapi/asm/hwcap.h of Linux, those that `host.FEATURES` names.
_HWCAP = {"asimd": 1, "asimdhp": 10, "asimddp": 20, "sve": 22}
_HWCAP2 = {"sve2": 1, "i8mm": 13, "bf16": 14, "sme": 23}
HWCAP_BITS: Mapping[str, int] = _HWCAP
# MIDR part numbers of Arm Ltd (implementer 0x41), from its technical reference manuals.
_ARM_PARTS: Mapping[str, str] = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd48": "Cortex-X2",
    "0xd49": "Neoverse-N2",
    "0xd4d": "Cortex-A715",
    "0xd4e": "Cortex-X3",
    "0xd4f": "Neoverse-V2",
    "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720",
    "0xd82": "Cortex-X4",
}


@dataclass(frozen=True, kw_only=True)
class Core:
    """One core. The frequencies are its limits in kHz; None and empty where the device does not tell."""

    index: int
    min_khz: int | None
    max_khz: int | None
    governor: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a device tells of itself; empty or None where it does not.

    model: As "Google Pixel 7". soc: As "Google GS201". cpu: Its cores, as "4x Cortex-A55, 4x Cortex-A76".
    machine: As `aarch64`. system: As "Android 14". api_level: Of Android.
    features: Those of `host.FEATURES` that its first core has.
    temperature_mc: The hottest of the processor's sensors when asked, in thousandths of a degree Celsius.
    emulated: Whether it is no device: Android's emulator, by its own word, or 64-bit ARM by name and x86 by its cores.
    """

    model: str
    soc: str
    cpu: str
    machine: str
    system: str
    kernel: str
    api_level: int | None
    features: tuple[str, ...]
    cores: tuple[Core, ...]
    temperature_mc: int | None
    emulated: bool = False


def parse(text: str) -> Facts:
    """Return what the output of `SCRIPT` says."""
    head, _, cpuinfo = text.partition("\ncpuinfo\n")
    pairs = [(key, value.strip()) for key, _, value in (line.partition("=") for line in head.splitlines())]
    single = dict(pairs)
    cpu = host.parse_cpuinfo(cpuinfo)
    android = single.get("android", "")
    return Facts(
        model=single.get("model", ""),
        soc=single.get("soc", "") or single.get("board", ""),
        cpu=_arm_cores(cpuinfo) or cpu.model,
        machine=single.get("machine", ""),
        system=f"Android {android}" if android else single.get("system", ""),
        kernel=single.get("kernel", ""),
        api_level=_whole(single.get("api", "")),
        features=cpu.features,
        cores=tuple(sorted(_cores([v for k, v in pairs if k == "core"]), key=lambda core: core.index)),
        temperature_mc=_hottest([v for k, v in pairs if k == "zone"]),
        emulated="1" in single.get("emulator", "") or _is_another(single.get("machine", ""), cpuinfo),
    )


def arm64_features(hwcap: int, hwcap2: int) -> tuple[str, ...]:
    """Return the features that a program on 64-bit ARM is told of by the kernel (AT_HWCAP and AT_HWCAP2)."""
    present = {name for name, bit in _HWCAP.items() if hwcap >> bit & 1}
    present |= {name for name, bit in _HWCAP2.items() if hwcap2 >> bit & 1}
    return tuple(name for name in host.FEATURES if name in present)


def _is_another(machine: str, cpuinfo: str) -> bool:
    """Return whether programs see 64-bit ARM where the kernel lists x86 cores, as under QEMU's user mode."""
    return machine in ("aarch64", "arm64") and "vendor_id" in cpuinfo and "CPU implementer" not in cpuinfo


def _arm_cores(cpuinfo: str) -> str:
    """Return the cores that /proc/cpuinfo of 64-bit ARM lists, counted by kind; empty on other processors."""
    makers = re.findall(r"^CPU implementer\s*: *(\S+)", cpuinfo, re.MULTILINE)
    parts = re.findall(r"^CPU part\s*: *(\S+)", cpuinfo, re.MULTILINE)
    named = [
        _ARM_PARTS.get(part, f"part {part}") if maker == "0x41" else f"implementer {maker} part {part}"
        for maker, part in zip(makers, parts, strict=False)
    ]
    return ", ".join(f"{count}x {name}" for name, count in Counter(named).items())


def _cores(lines: Sequence[str]) -> list[Core]:
    found = []
    for line in lines:
        index, low, high, governor, *_ = *line.split(" ", 3), "", "", ""
        if index.isdigit():
            found.append(Core(index=int(index), min_khz=_whole(low), max_khz=_whole(high), governor=governor))
    return found


def _hottest(lines: Sequence[str]) -> int | None:
    zones = [(name, _whole(value)) for name, _, value in (line.rpartition(" ") for line in lines)]
    # Kernels differ on whether a zone counts in degrees or in thousandths of one.
    readings = [(name, t if t > 1000 else 1000 * t) for name, t in zones if t is not None and 0 < t < 150_000]
    named = [t for name, t in readings if _CPU_ZONE.search(name)]
    return max(named, default=None)


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None
