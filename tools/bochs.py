"""Kernel drivers on a processor that is not here: Debian's Bochs boots Debian's kernel, which runs nothing but them.

    python tools/bochs.py MODEL DRIVER...

MODEL is one of Bochs' processors, drivers are static programs. Everything is in build/platforms/bochs; what is there is
used again. apt-get and dpkg-deb are needed, root is not. Exits with 1 unless every driver ran and passed.
"""

import gzip
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

from debian import Debian

WORK = Path(__file__).parents[1] / "build" / "platforms" / "bochs"
ROOT, DISC, IMAGE = WORK / "root", WORK / "disc", WORK / "disc.iso"
LIBRARIES = ROOT / "usr" / "lib" / "x86_64-linux-gnu"
SUITE = "trixie"  # with Bochs 3
PACKAGES = ("bochs", "bochs-term", "vgabios", "linux-image-cloud-amd64", "busybox-static")
PACKAGES += ("isolinux", "syslinux-common", "genisoimage")  # for a disc to boot from
LONGEST = 2 * 60 * 60  # seconds

# Without devices it boots in half a minute. Linux refuses the sizes that Bochs gives for compact forms of registers.
KERNEL = "console=ttyS0 loglevel=1 acpi=off pci=off nosmp tsc=reliable mitigations=off clearcpuid=xsaves,xsavec"
BOOT = f"default linux\nprompt 0\nlabel linux\nkernel linux\ninitrd programs\nappend {KERNEL}\n"
INIT = """#!/busybox sh
for driver in /driver-*; do
  echo "begin $driver"
  $driver
  echo "end $driver $?"
done
echo "end all 0"
/busybox sleep 1000000
"""
MACHINE = """\
display_library: term
config_interface: textconfig
megs: 512
romimage: file={root}/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file={root}/usr/share/vgabios/vgabios.bin
cpu: model={model}, count=1, ips=30000000
clock: sync=none
ata0-master: type=cdrom, path={image}, status=inserted
boot: cdrom
com1: enabled=1, mode=term, dev={serial}
log: {work}/log.txt
panic: action=fatal
speaker: enabled=0
"""


def main() -> int:
    model, *drivers = sys.argv[1:]
    prepare()
    make_disc([Path(each) for each in drivers])
    passed = sum(run(model))
    print(f"{passed} of {len(drivers)} drivers passed on Bochs' {model}")
    return int(passed != len(drivers))


def prepare() -> None:
    """Unpack Debian's packages, unless they are there."""
    made = WORK / "made"
    asked = " ".join((SUITE, *PACKAGES))
    if made.is_file() and made.read_text() == asked:
        return
    if missing := [each for each in ("apt-get", "dpkg-deb") if not shutil.which(each)]:
        raise SystemExit(f"{' and '.join(missing)} of Debian are needed to get Bochs, and are missing here")
    shutil.rmtree(WORK, ignore_errors=True)
    Debian(WORK / "apt", SUITE, "amd64").unpack(ROOT, *PACKAGES)
    made.write_text(asked)


def debian(program: str, *arguments: str | Path) -> list[str]:
    """Return the command for a program of the unpacked system, which is another one than this."""
    loader = ROOT / "usr" / "lib64" / "ld-linux-x86-64.so.2"
    return [str(each) for each in (loader, "--library-path", LIBRARIES, ROOT / "usr" / "bin" / program, *arguments)]


def make_disc(drivers: list[Path]) -> None:
    shutil.rmtree(DISC, ignore_errors=True)
    DISC.mkdir()
    (kernel,) = ROOT.glob("boot/vmlinuz-*")
    programs = {"init": INIT.encode(), "busybox": (ROOT / "usr" / "bin" / "busybox").read_bytes()}
    programs |= {each.name: each.read_bytes() for each in drivers}
    shutil.copy(kernel, DISC / "linux")
    shutil.copy(ROOT / "usr" / "lib" / "ISOLINUX" / "isolinux.bin", DISC)
    shutil.copy(ROOT / "usr" / "lib" / "syslinux" / "modules" / "bios" / "ldlinux.c32", DISC)
    (DISC / "isolinux.cfg").write_text(BOOT)
    (DISC / "programs").write_bytes(gzip.compress(archive(programs)))
    boot = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    subprocess.run(debian("genisoimage", "-quiet", "-o", IMAGE, *boot, DISC), check=True)


def archive(programs: dict[str, bytes]) -> bytes:
    """Return the first file system of a kernel, in cpio's format: a console and programs."""
    parts = [member("dev", 0o040755), member("dev/console", 0o020600, device=(5, 1))]
    parts += [member(name, 0o100755, data) for name, data in programs.items()]
    return b"".join([*parts, member("TRAILER!!!", 0)])


def member(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % each for each in numbers) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def run(model: str) -> list[bool]:
    """Boot, print what the drivers say, and return for each that ended whether it passed."""
    screen, screen_end = pty.openpty()
    serial, serial_end = pty.openpty()
    machine, commands = WORK / "machine.txt", WORK / "commands.txt"
    machine.write_text(MACHINE.format(root=ROOT, work=WORK, image=IMAGE, model=model, serial=os.ttyname(serial_end)))
    commands.write_text("c\nq\n")  # Debian's Bochs has a debugger: continue; where that ends, quit
    bochs = debian("bochs-bin", "-q", "-f", machine, "-rc", commands)
    environment = os.environ | {"TERM": "vt100", "LTDL_LIBRARY_PATH": str(LIBRARIES / "bochs" / "plugins")}
    # With a terminal for its input Bochs would wait for a key, a moment of every pause.
    process = subprocess.Popen(bochs, stdin=subprocess.DEVNULL, stdout=screen_end, stderr=screen_end, env=environment)
    try:
        return follow(process, screen, serial)
    finally:
        process.kill()
        process.wait()


def follow(process: "subprocess.Popen[bytes]", screen: int, serial: int) -> list[bool]:
    """Read what Bochs draws, to no end, and the lines of the serial port, until all drivers ended."""
    began, text, skipped = time.monotonic(), "", False
    results: list[bool] = []
    while time.monotonic() < began + LONGEST and process.poll() is None:
        ready, _, _ = select.select([screen, serial], [], [], 1)
        if screen in ready:
            os.read(screen, 4096)
        if serial in ready:
            text += os.read(serial, 4096).decode(errors="replace")
        *lines, text = text.split("\n")
        for line in lines:
            print(f"{time.monotonic() - began:5.0f} s  {line.strip()}", flush=True)
            skipped |= line.startswith("skipped")
            if ended := re.match(r"end (\S+) (\d+)", line):
                if ended[1] == "all":
                    return results
                results.append(ended[2] == "0" and not skipped)
                skipped = False
    print(f"Bochs ended before the drivers did, or took {LONGEST} seconds: see {WORK / 'log.txt'}", file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(main())
