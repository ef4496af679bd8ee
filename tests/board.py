"""A board that ssh reaches: a real sshd on this machine, with its own keys; its arm64 programs run under QEMU."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

# A bash that sshd starts reads the user's own .bashrc unless SHLVL says that it lies inside another.
SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
ForceCommand {folder}/arm64-shell
SetEnv SHLVL=1
"""
SSH = """\
Host board
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
"""
# Its folder for temporary files is the board's own; a program gets a script in front of it that runs it under QEMU.
SHELL = """\
#!/bin/sh
PATH={folder}/bin:$PATH
sh -c "$(printf %s "$SSH_ORIGINAL_COMMAND" | sed 's#/tmp/edgekit-#{folder}/tmp/edgekit-#g')"
code=$?
for program in {folder}/tmp/edgekit-*/program {folder}/tmp/edgekit-*/bench; do
    if [ "$(head -c 4 "$program" 2>/dev/null | tail -c 3)" = ELF ]; then
        mv "$program" "$program.elf"
        printf '#!/bin/sh\\nexec {emulator} -cpu {cpu} %s "$@"\\n' "$program.elf" >"$program"
        chmod 755 "$program"
    fi
done
exit $code
"""


class Board:
    """A board on a port of this machine; `name` is what ssh knows it by, with `bin` first on the PATH."""

    name = "board"

    def __init__(self, folder: Path, cpu: str) -> None:
        self.folder, self.bin = folder, folder / "client"
        (folder / "tmp").mkdir(parents=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        names = {
            "folder": folder,
            "port": self.port,
            "user": getpass.getuser(),
            "cpu": cpu,
            "emulator": shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64"),
        }
        for key in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host_key.pub').read_text()}")
        (folder / "sshd_config").write_text(SSHD.format(**names))
        (folder / "ssh_config").write_text(SSH.format(**names))
        self._script(folder / "arm64-shell", SHELL.format(**names))
        self._script(folder / "bin" / "uname", '#!/bin/sh\n[ "$1" = -m ] && echo aarch64 || echo 6.1.0\n')
        self._script(self.bin / "ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where root's sshd locks itself up
        self._sessions: list[subprocess.Popen[bytes]] = []
        self._server = threading.Thread(target=self._accept, daemon=True)
        self._server.start()

    def tell(self, path: str, text: str) -> None:
        """Let the board have another file at a path of the system that its shell reads by `cat`."""
        kept = self.folder / path.strip("/").replace("/", "-")
        kept.write_text(text)
        words = f'for file; do [ "$file" = {path} ] && exec {shutil.which("cat")} {kept}; done'
        self._script(self.folder / "bin" / "cat", f'#!/bin/sh\n{words}\nexec {shutil.which("cat")} "$@"\n')

    def unplug(self) -> None:
        """Be gone from one moment to the next, with every session."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes who accepts
        self._server.join()
        self._listener.close()
        while self._sessions:
            session = self._sessions.pop()
            if session.poll() is None:
                for number in [*_children(session.pid), session.pid]:
                    with suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
                session.wait()

    def _accept(self) -> None:
        command = [sshd(), "-i", "-e", "-f", str(self.folder / "sshd_config")]
        with suppress(OSError), (self.folder / "sshd.log").open("ab") as log:
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    both = connection.fileno()
                    self._sessions.append(subprocess.Popen(command, stdin=both, stdout=both, stderr=log))

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def sshd() -> str:
    """Return the path of sshd, which insists on being called by it; empty where it is not installed."""
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") or ""


def _children(number: int) -> list[int]:
    """Return the processes that one has started, and theirs."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, which may hold anything, ends at the last parenthesis; state and parent follow.
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found, new = list[int](), {number}
    while new := {child for child, parent in parents.items() if parent in new}:
        found += new
    return found
