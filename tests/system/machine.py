"""A throw-away virtual machine: boot it, run commands in it as root, cut its power, boot it again.

    with Machine() as machine:
        machine.put_checkout(root)
        machine.run("cd /root/agentd && make install", timeout_s=600)
        machine.power_off_hard()
        machine.boot()

The promise: a machine starts from the image as it was built, and nothing of it is left over, however this
process ends. What the guest synced before its power was cut is there at the next boot; the disk is gone
when the `with` block ends. The guest reaches nothing outside itself; this process reaches the guest by SSH
through one port of 127.0.0.1.

It does not build anything: `scripts/vm build` does, and is asked when no image is given. KVM is used only
where it has booted this very image before, since there are hosts whose /dev/kvm opens and then hangs the
guest; elsewhere qemu emulates, some ten times slower, and deadlines here allow for it.

    MachineError
    ├── BootFailed         look at the console's last lines, which the message holds
    ├── CommandFailed      the command's own fault: `result` has what it said
    ├── CommandTimedOut    the command was killed in the guest at its deadline
    └── MachineOff         boot() first
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

GUEST_CHECKOUT = "/root/agentd"
GUEST_WHEELS = "/var/cache/agentd/wheels"

BOOT_TIMEOUT_S = 180.0
COMMAND_TIMEOUT_S = 120.0
COPY_TIMEOUT_S = 300.0
# On top of a command's own deadline, which the guest keeps: ssh's and a slow guest's share.
ANSWER_GRACE_S = 30.0
SHUTDOWN_TIMEOUT_S = 60.0
# A working KVM prints the awaited line within three seconds.
KVM_PROBE_TIMEOUT_S = 15.0
CONSOLE_TAIL_LINES = 40

ACCELERATION = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    # x86-64-v2, which the wheels ask for, and no more: "max" has features that this emulator gets wrong
    # (seen with qemu 7.2: corrupt mount tables, lock-ups in the kernel's crypto self-tests).
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"),
}

# Kills the qemu whose pid it read last and removes the folder, once we are gone (the pipe's end says so) or
# close it ourselves. The command line is compared, so that a pid used again by another program is safe.
WATCHDOG = """
folder=$1 qemu=0
while read -r line; do qemu=$line; done
if [ "$qemu" != 0 ] && grep -qF "$folder" "/proc/$qemu/cmdline" 2>/dev/null; then kill -9 "$qemu"; fi
rm -rf "$folder"
"""


class MachineError(Exception):
    """Anything that goes wrong with the virtual machine; the module's docstring draws the branches."""


class BootFailed(MachineError):
    pass


class MachineOff(MachineError):
    pass


class CommandTimedOut(MachineError):
    pass


class CommandFailed(MachineError):
    def __init__(self, command: str, result: Result) -> None:
        said = (result.stderr.strip() or result.stdout.strip())[-4000:]
        super().__init__(f"cannot run {command!r} in the machine: it ended with {result.rc}: {said}")
        self.result = result


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended: its status (128 + n after signal n) and what it printed, as UTF-8."""

    rc: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Image:
    """What `scripts/vm build` made: the folder of the image, and that of the wheels' disk."""

    folder: Path
    wheels_folder: Path | None = None

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def disk(self) -> Path:
        return self.folder / "disk.img"

    @property
    def host_key(self) -> Path:
        return self.folder / "host_key.pub"

    @property
    def wheels_disk(self) -> Path | None:
        return self.wheels_folder and self.wheels_folder / "wheels.img"

    @classmethod
    def built(cls) -> Self:
        """The checkout's image, from the cache or made now (minutes, and root)."""
        script = Path(__file__).resolve().parents[2] / "scripts" / "vm"
        try:
            made = subprocess.run(["/usr/bin/python3", script, "build"], check=True, stdout=subprocess.PIPE, text=True)
        except subprocess.CalledProcessError as error:
            raise MachineError(f"cannot build the image: scripts/vm build ended with {error.returncode}")
        folders = json.loads(made.stdout)
        return cls(Path(folders["image"]), Path(folders["wheels"]))


def accelerator(image: Image) -> str:
    """ "kvm" where this image's kernel reaches its first program under it, else "tcg".

    The answer holds until the host boots again and is kept beside the image.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    answer = image.folder / f"accelerator-{boot_id}"
    try:
        return answer.read_text()
    except FileNotFoundError:
        pass
    found = "kvm" if _boots_under_kvm(image) else "tcg"
    # Read-only caches are fine: then every process asks anew.
    with contextlib.suppress(OSError):
        for outdated in image.folder.glob("accelerator-*"):
            outdated.unlink()
        partial = answer.with_name(f".{answer.name}.{os.getpid()}")
        partial.write_text(found)
        partial.rename(answer)
    return found


def _boots_under_kvm(image: Image) -> bool:
    deadline = time.monotonic() + KVM_PROBE_TIMEOUT_S
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", "-machine", "pc", *ACCELERATION["kvm"], "-smp", "2", "-m", "512",
         "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
         "-kernel", str(image.kernel), "-initrd", str(image.initrd),
         "-append", "console=ttyS0 panic=-1 rdinit=/bin/sh"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert qemu.stdin and qemu.stdout
    # The kernel's banner proves too little: some hosts hang later. The initrd's shell must answer; it is
    # asked again and again, since what is typed before it listens may be lost.
    printed = b""
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select([qemu.stdout], [], [], min(left_s, 0.5))
            if readable:
                chunk = os.read(qemu.stdout.fileno(), 65536)
                if not chunk:
                    return False
                printed += chunk
                if b"guest is 42" in printed:
                    return True
            else:
                qemu.stdin.write(b"echo guest is $((6*7))\n")
                qemu.stdin.flush()
        return False
    except BrokenPipeError:
        return False
    finally:
        qemu.kill()
        with contextlib.suppress(BrokenPipeError):
            qemu.communicate()


@dataclass
class _Running:
    """One boot: qemu, its control socket, and ssh's master connection."""

    qemu: subprocess.Popen[bytes]
    control: socket.socket
    master: subprocess.Popen[bytes] | None = None
    lines: IO[str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = self.control.makefile("rw")

    def ask(self, execute: str, **arguments: str) -> object:
        """qemu's answer over its machine protocol (QMP)."""
        try:
            self.lines.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
            self.lines.flush()
            for line in self.lines:
                answer = json.loads(line)  # or a greeting or an event, which are passed over
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise BootFailed(f"cannot ask qemu to {execute}: {answer['error']['desc']}")
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass
        raise BootFailed(f"cannot ask qemu to {execute}: it does not answer")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.lines.close()
        self.control.close()


class Machine:
    """A virtual machine, on between `with` and its end unless told otherwise.

    `run`, `put` and `get` may be used from several threads at once.
    """

    def __init__(self, image: Image | None = None, *, memory_mib: int = 2048, cpus: int = 2) -> None:
        self.image = image or Image.built()
        self.memory_mib = memory_mib
        self.cpus = cpus
        self.accelerator = "tcg"
        self.boot_s = 0.0  # how long the last boot took
        self._folder = Path()
        self._watchdog: subprocess.Popen[str] | None = None
        self._running: _Running | None = None

    def __enter__(self) -> Self:
        # /var/tmp, because the disk may grow and /tmp may be memory; the path must also fit a socket's name.
        self._folder = Path(tempfile.mkdtemp(prefix="agentd-vm-", dir="/var/tmp"))
        try:
            self._watchdog = subprocess.Popen(
                ["sh", "-c", WATCHDOG, "agentd-vm-watchdog", str(self._folder)],
                stdin=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            self.accelerator = accelerator(self.image)
            self._make_disk_and_key()
            self.boot()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def boot(self) -> None:
        """The guest is up: its start-up jobs are done and SSH answers. BootFailed after BOOT_TIMEOUT_S."""
        if self.is_on:
            raise MachineError("cannot boot the machine: it is on")
        self._forget()
        started = time.monotonic()
        deadline = started + BOOT_TIMEOUT_S
        with self._console_path.open("ab") as console:
            console.write(b"\n")
        try:
            self._start_qemu()
            port = self._forwarded_port()
            self._await_ssh(port, deadline)
            self._connect(port, deadline)
            # Says "degraded" when a unit failed, which is for the caller to judge.
            self.run("systemctl is-system-running --wait", check=False, timeout_s=deadline - time.monotonic())
        except CommandTimedOut:
            jobs = self.run("systemctl list-jobs --no-pager", check=False).stdout
            self.power_off_hard()
            raise BootFailed(self._with_console(f"start-up jobs did not end in time:\n{jobs}"))
        except BaseException:
            self.power_off_hard()
            raise
        self.boot_s = time.monotonic() - started

    @property
    def is_on(self) -> bool:
        return self._running is not None and self._running.qemu.poll() is None

    def run(
        self,
        command: str,
        *,
        check: bool = True,
        timeout_s: float = COMMAND_TIMEOUT_S,
        input: str | bytes | None = None,
    ) -> Result:
        """How `command` ended, a line for bash run as root in /root.

        Raises CommandFailed unless it ended with 0 or `check` is false, and CommandTimedOut after
        `timeout_s`, when the command and what it started in its process group have been killed; MachineOff
        if the machine goes off (or reboots, which ends qemu) before the command does.
        """
        given = input.encode() if isinstance(input, str) else input
        rc, out, err = self._ssh(command, given, timeout_s)
        result = Result(rc, out.decode(errors="replace"), err.decode(errors="replace"))
        if check and result.rc != 0:
            raise CommandFailed(command, result)
        return result

    def interact(self, command: str | None) -> int:
        """The exit status of `command` (or of a login shell) on this process's own terminal and streams."""
        terminal = ["-t"] if os.isatty(0) and os.isatty(1) else []
        line = [] if command is None else [f"bash -c {shlex.quote(command)}; exit $?"]
        self._require_on()
        return subprocess.run([*self._ssh_argv(), *terminal, "vm", *line], check=False).returncode

    def put(self, local: Path | str, remote: str) -> None:
        """The file or folder `local` is in the guest at `remote`, root's; a folder is merged into one there."""
        source, target = Path(local).resolve(), Path(remote)
        if source.is_dir():
            argv = ["tar", "-C", str(source), "--owner=0", "--group=0", "-cf", "-", "."]
            self._send(argv, f"mkdir -p {_q(target)} && tar -C {_q(target)} -xf - --no-overwrite-dir", local)
        else:
            rename = f"s,^.*$,{_tar_literal(target.name)},"
            argv = ["tar", "-C", str(source.parent), "--owner=0", "--group=0", f"--transform={rename}",
                    "-cf", "-", "--no-unquote", "--", source.name]  # fmt: skip
            self._send(argv, f"mkdir -p {_q(target.parent)} && tar -C {_q(target.parent)} -xf -", local)

    def put_checkout(self, root: Path) -> None:
        """GUEST_CHECKOUT holds what git tracks or would track of the working tree at `root`, and nothing else."""
        listing = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"],
            check=False, capture_output=True,
        )  # fmt: skip
        if listing.returncode != 0:
            raise MachineError(f"cannot list the checkout {root}: {listing.stderr.decode(errors='replace').strip()}")
        # A file deleted but not yet staged is still listed.
        listed = listing.stdout.split(b"\0")
        there = [name for name in listed if name and os.path.lexists(os.path.join(os.fsencode(root), name))]
        argv = ["tar", "-C", str(root), "--owner=0", "--group=0", "--null", "-T", "-", "-cf", "-"]
        checkout = _q(Path(GUEST_CHECKOUT))
        self._send(argv, f"rm -rf {checkout} && mkdir -p {checkout} && tar -C {checkout} -xf -", root,
                   names=b"\0".join(there))  # fmt: skip

    def get(self, remote: str, local: Path | str) -> None:
        """The guest's file or folder `remote` is at `local`, which must not be there yet."""
        source, target = Path(remote), Path(local)
        if os.path.lexists(target):
            raise MachineError(f"cannot get {remote}: {target} is there already")
        command = f"tar -C {_q(source.parent)} -cf - --no-unquote -- {_q(Path(source.name))}"
        rc, archive, err = self._ssh(command, None, COPY_TIMEOUT_S)
        if rc != 0:
            raise MachineError(f"cannot get {remote}: {err.decode(errors='replace').strip()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked = Path(tempfile.mkdtemp(prefix=".from-vm-", dir=target.parent))
        try:
            subprocess.run(["tar", "-C", str(unpacked), "--no-same-owner", "-xf", "-"], input=archive, check=True)
            (unpacked / source.name).rename(target)
        finally:
            shutil.rmtree(unpacked)

    def power_off_hard(self) -> None:
        """The machine is off as by a power cut: what the guest had not synced may be lost."""
        if self._running:
            self._running.qemu.kill()
        self._forget()

    def shutdown(self) -> None:
        """The machine is off, its services stopped in order; by force after SHUTDOWN_TIMEOUT_S."""
        if self.is_on:
            assert self._running
            self.run("systemctl poweroff --no-block", check=False)
            try:
                self._running.qemu.wait(SHUTDOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
        self.power_off_hard()

    def console(self) -> str:
        """What all boots printed on the serial console."""
        try:
            return self._console_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # -- starting

    @property
    def _console_path(self) -> Path:
        return self._folder / "console.log"

    @property
    def _disk(self) -> Path:
        return self._folder / "disk.qcow2"

    def _make_disk_and_key(self) -> None:
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self.image.disk), str(self._disk)],
            check=True,
        )  # fmt: skip
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "agentd-vm", "-f", str(self._folder / "key")],
            check=True,
        )  # fmt: skip

    def _start_qemu(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        with theirs, (self._folder / "qemu.log").open("wb") as log:
            qemu = subprocess.Popen(
                self._qemu_argv(theirs.fileno()),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self._running = _Running(qemu, ours)
        self._tell_watchdog(qemu.pid)

    def _qemu_argv(self, control_fd: int) -> list[str]:
        # Not cache=unsafe: a synced write must be in the overlay's tables when qemu is killed.
        disk = "if=none,format={},id={},file={}"
        key = (self._folder / "key.pub").read_text().strip()
        kernel_line = (
            "console=ttyS0 root=/dev/vda rw rootwait fsck.mode=skip loglevel=4 net.ifnames=0 panic=-1 "
            "mitigations=off random.trust_cpu=on tsc=reliable no_timer_check "
            "systemd.show_status=error modprobe.blacklist=ata_piix,psmouse,pcspkr,drm "
            f'"systemd.set_credential=ssh.authorized_keys.root:{key}"'
        )
        argv = [
            "qemu-system-x86_64", "-name", "agentd-vm", "-nodefaults", "-no-user-config", "-display", "none",
            "-no-reboot", "-machine", "pc,usb=off,vmport=off,hpet=off",
            *ACCELERATION[self.accelerator],
            "-smp", str(self.cpus), "-m", str(self.memory_mib),
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", kernel_line,
            "-chardev", f"file,id=console,append=on,path={self._console_path}", "-serial", "chardev:console",
            "-chardev", f"socket,id=control,fd={control_fd}", "-mon", "chardev=control,mode=control",
            "-drive", disk.format("qcow2", "root", self._disk), "-device", "virtio-blk-pci,drive=root",
            # restrict: no way out of the guest. Port 0: the kernel picks one that is free.
            "-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-10.0.2.15:22",
            "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci",
        ]  # fmt: skip
        if self.image.wheels_disk:
            drive = disk.format("raw", "wheels", self.image.wheels_disk) + ",readonly=on"
            argv += ["-drive", drive, "-device", "virtio-blk-pci,drive=wheels"]
        return argv

    def _forwarded_port(self) -> int:
        assert self._running
        try:
            self._running.ask("qmp_capabilities")
            connections = self._running.ask("human-monitor-command", **{"command-line": "info usernet"})
        except BootFailed as error:
            raise BootFailed(self._with_console(str(error))) from None
        if not (found := re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", str(connections))):
            raise BootFailed(f"cannot find the forwarded port in qemu's answer: {connections}")
        return int(found[1])

    def _await_ssh(self, port: int, deadline: float) -> None:
        # qemu accepts for the guest, so only the server's greeting tells that one is there.
        while (left_s := deadline - time.monotonic()) > 0:
            assert self._running
            if self._running.qemu.poll() is not None:
                raise BootFailed(self._with_console(f"qemu ended with {self._running.qemu.returncode}"))
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=min(left_s, 10)) as connection:
                    if connection.recv(4) == b"SSH-":
                        return
            except OSError:
                pass
            time.sleep(min(left_s, 0.3))
        raise BootFailed(self._with_console(f"no SSH within {BOOT_TIMEOUT_S:.0f} s"))

    def _connect(self, port: int, deadline: float) -> None:
        kind_and_key = " ".join(self.image.host_key.read_text().split()[:2])
        (self._folder / "known_hosts").write_text(f"agentd-vm {kind_and_key}\n")
        options = {
            "HostName": "127.0.0.1", "Port": port, "User": "root", "HostKeyAlias": "agentd-vm",
            "UserKnownHostsFile": self._folder / "known_hosts", "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes", "IdentityFile": self._folder / "key", "IdentitiesOnly": "yes",
            "IdentityAgent": "none", "PreferredAuthentications": "publickey", "BatchMode": "yes",
            "ControlPath": self._folder / "master", "LogLevel": "ERROR", "SendEnv": "-*",
            "ConnectTimeout": 60,
        }  # fmt: skip
        text = "Host vm\n" + "".join(f"    {name} {value}\n" for name, value in options.items())
        (self._folder / "ssh_config").write_text(text)
        master_path = self._folder / "master"
        master_path.unlink(missing_ok=True)
        with (self._folder / "ssh.log").open("wb") as log:
            master = subprocess.Popen(
                [*self._ssh_argv(), "-o", "ControlMaster=yes", "-N", "vm"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        assert self._running
        self._running.master = master
        # The socket appears once the master is let in.
        while not master_path.exists():
            if master.poll() is not None or time.monotonic() > deadline:
                said = (self._folder / "ssh.log").read_text(errors="replace").strip()
                raise BootFailed(self._with_console(f"SSH did not let us in: {said}"))
            time.sleep(0.05)

    def _with_console(self, cause: str) -> str:
        qemu_said = (self._folder / "qemu.log").read_text(errors="replace").strip()
        tail = "\n".join(self.console().splitlines()[-CONSOLE_TAIL_LINES:])
        return f"cannot boot the machine: {cause}\n{qemu_said}\n--- the console's last lines ---\n{tail}"

    # -- talking

    def _ssh_argv(self) -> list[str]:
        return ["ssh", "-F", str(self._folder / "ssh_config")]

    def _require_on(self) -> None:
        if not self.is_on:
            raise MachineOff("cannot reach the machine: it is off")

    def _ssh(self, command: str, given: bytes | None, timeout_s: float) -> tuple[int, bytes, bytes]:
        self._require_on()
        # The guest keeps the deadline: killing ssh here would leave the command running there.
        # The status is said by a shell, since a signal's would reach us as ssh's own 255.
        line = f"timeout -s KILL {max(timeout_s, 0.001):.3f} bash -c {shlex.quote(command)}; exit $?"
        started = time.monotonic()
        ssh = subprocess.Popen(
            [*self._ssh_argv(), "vm", line],
            stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = ssh.communicate(given, timeout_s + ANSWER_GRACE_S)
        except subprocess.TimeoutExpired:
            ssh.kill()
            out, err = ssh.communicate()
            raise CommandTimedOut(self._timed_out(command, timeout_s, out, err))
        except BaseException:
            ssh.kill()
            ssh.communicate()
            raise
        # timeout dies by the KILL it sends.
        if ssh.returncode == 137 and time.monotonic() - started >= timeout_s:
            raise CommandTimedOut(self._timed_out(command, timeout_s, out, err))
        if ssh.returncode == 255 and self._has_gone():
            raise MachineOff(f"cannot wait for {command!r}: the machine went off meanwhile")
        return ssh.returncode, out, err

    def _has_gone(self) -> bool:
        """Whether ssh's 255 was its own: then the master connection has ended or is about to."""
        running = self._running
        if running is None or running.master is None:
            return True
        try:
            running.master.wait(1)
        except subprocess.TimeoutExpired:
            return False
        return True

    @staticmethod
    def _timed_out(command: str, timeout_s: float, out: bytes, err: bytes) -> str:
        said = (out + err).decode(errors="replace")[-4000:]
        return f"cannot run {command!r} within {timeout_s:.0f} s; it had said: {said}"

    def _send(self, argv: list[str], command: str, what: Path | str, *, names: bytes = b"") -> None:
        """The archive that the local `argv` prints is unpacked by `command` in the guest."""
        packed = subprocess.run(argv, check=False, input=names, capture_output=True)
        if packed.returncode != 0:
            raise MachineError(f"cannot put {what}: {packed.stderr.decode(errors='replace').strip()}")
        rc, _, err = self._ssh(command, packed.stdout, COPY_TIMEOUT_S)
        if rc != 0:
            raise MachineError(f"cannot put {what}: {err.decode(errors='replace').strip()}")

    # -- ending

    def _forget(self) -> None:
        """Nothing of the last boot runs any more; qemu has ended or was killed."""
        if not self._running:
            return
        running, self._running = self._running, None
        if running.master:
            running.master.kill()
            running.master.wait()
        running.qemu.wait()
        self._tell_watchdog(0)
        running.close()

    def _tell_watchdog(self, qemu_pid: int) -> None:
        assert self._watchdog and self._watchdog.stdin
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(f"{qemu_pid}\n")
            self._watchdog.stdin.flush()

    def _close(self) -> None:
        if self._watchdog and self._watchdog.stdin:
            self.power_off_hard()
            with contextlib.suppress(BrokenPipeError):
                self._watchdog.stdin.close()
            self._watchdog.wait()
        else:
            shutil.rmtree(self._folder, ignore_errors=True)


def _q(path: Path) -> str:
    return shlex.quote(str(path))


def _tar_literal(name: str) -> str:
    """`name` as the replacement of tar's --transform, with commas around it."""
    return re.sub(r"([\\&,])", r"\\\1", name)
