"""What a student's process may do, taken away from it between fork and its first line: without root, without a helper binary.

Four layers, each of which holds if another fails:

- namespaces (user, mount, pid, ipc, uts, network): no other process can be named, no network is there, /proc shows only what the
  student started, every file system but the scratch folder's is read-only, and all of it dies with the first process of the namespace;
- Landlock: files may be read where `Policy.read` says, written in `Policy.scratch` (a small file system in memory) and nowhere else;
- seccomp: no tracing, mounting, new namespaces, keys, kernel modules, and other calls that no exercise needs;
- resource limits: memory, processor time, size and number of files, processes.

Linux 5.13 or newer with unprivileged user namespaces has them all. `missing()` says what a machine lacks. Landlock: docs.kernel.org,
userspace-api/landlock; seccomp: userspace-api/seccomp_filter.
"""
import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import dataclass

# What is mostly the reason where a layer is missing.
HINTS = {
    "namespaces": "see sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns; in a container, "
                  "its seccomp profile must allow unshare and mount, and /proc must not be masked",
    "landlock": "Linux 5.13 or newer has it, where `landlock` is among the kernel's parameters lsm=",
    "seccomp": "the kernel is built without it, or this is not x86_64 or aarch64",
    "limits": "a limit of this process may be lower already",
}
LAYERS = ("namespaces", "landlock", "seccomp", "limits")


@dataclass(frozen=True)
class Policy:
    """`read`: files and folders that may be read, `listed`: folders whose entries may be listed; `scratch`: the folder that may be
    written; sizes in bytes, `seconds` of processor time for one process.
    """

    scratch: str
    read: tuple
    listed: tuple = ()
    memory: int = 4 << 30
    seconds: int = 600
    file_size: int = 64 << 20
    disk: int = 128 << 20
    processes: int = 64
    files: int = 256


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(what, *arguments):
    """A function of the C library by name, or a system call by number; OSError if it fails."""
    result = getattr(_libc, what)(*arguments) if isinstance(what, str) else _libc.syscall(what, *arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- namespaces ------------------------------------------------------------------------------------------------------

_NEW = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
_LEAST_PID_MAX = 301
_READ_ONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 0x20, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _HERE, _BELOW_TOO = 442, -100, 0x8000


def leave_namespaces():
    """Into fresh namespaces; the pid namespace holds for the children of this process, of which the first is its init."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", sum(_NEW[n] for n in ("user", "mount", "pid", "ipc", "uts", "net")))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def own_mounts(policy):
    """As init of the pid namespace: all that is there read-only, /proc of this namespace only, a small file system in memory as scratch folder."""
    _call("mount", b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
    _call(_MOUNT_SETATTR, _HERE, b"/", _BELOW_TOO, struct.pack("QQQQ", _READ_ONLY, 0, 0, 0), 32)
    _call("mount", b"proc", b"/proc", b"proc", _NOSUID | _NODEV | _NOEXEC, None)
    # The limit on a user's processes does not hold for root; this one, of newer kernels (6.14), does.
    with contextlib.suppress(OSError), open("/proc/sys/kernel/pid_max", "w") as file:
        file.write(str(_LEAST_PID_MAX + policy.processes))
    # Root's own files in /proc/sys are root's in a user namespace too.
    _call("mount", None, b"/proc", None, _REMOUNT | _BIND | _READ_ONLY | _NOSUID | _NODEV | _NOEXEC, None)
    options = f"size={policy.disk},nr_inodes=20000,mode=700"
    _call("mount", b"tmpfs", os.fsencode(policy.scratch), b"tmpfs", _NOSUID | _NODEV, options.encode())


# --- Landlock --------------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REFER, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


def landlock_version():
    """The Landlock interface of this kernel, 0 without one."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, 0, 1)) if _libc is not None else 0


def landlock(read, write, listed=()):
    """Of all files only those below `read` may be read or executed and those below `write` written, of other folders only `listed` and
    what lies below be listed; for this process and all it starts.
    """
    version = landlock_version()
    if version == 0:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    everything = (1 << 13) - 1 | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0) | (_IOCTL_DEV if version >= 5 else 0)
    tcp = 3 if version >= 4 else 0      # bind and connect
    scoped = 3 if version >= 6 else 0   # abstract sockets and signals to the outside
    attributes = struct.pack("QQQ", everything, tcp, scoped)[:8 if version < 4 else 16 if version < 6 else 24]
    rules = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    for paths, rights in ((read, _EXECUTE | _READ_FILE | _READ_DIR), (listed, _READ_DIR), (write, everything)):
        for path in paths:
            try:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            allowed = rights & everything & (~0 if os.path.isdir(path) else _OF_FILES)
            _call(_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, handle), 0)
            os.close(handle)
    no_new_privileges()
    _call(_RESTRICT_SELF, rules, 0)
    os.close(rules)


# --- seccomp ---------------------------------------------------------------------------------------------------------

# Name: number on x86_64, on aarch64.
DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "personality": (135, 92),
    # memory that no limit counts: of files without a name, and of segments that stay when nobody has them mapped
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
}
# column, audit architecture, clone, clone3, prctl
_MACHINES = {"x86_64": (0, 0xC000003E, 56, 435, 157), "aarch64": (1, 0xC00000B7, 220, 435, 167)}
_LOAD, _EQUAL, _AT_LEAST, _HAS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 1, 22, 38, 2


def _program():
    """The filter as BPF instructions (code, if true, if false, k), jumps counted from the next instruction."""
    column, architecture, clone, clone3, prctl = _MACHINES[platform.machine()]
    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    # Another architecture's numbers, and x86's second numbering (from 2^30), would be a way around the list.
    head = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), refuse,
            (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, 1 << 30), refuse,
            # clone3's flags lie in memory, where a filter cannot look; without it the C library falls back to clone.
            (_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    tail = [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_HAS, 5, 0, sum(_NEW.values())), (_RETURN, 0, 0, _ALLOW),
            # Who asks no more to be killed with its parent could outlive it.
            (_EQUAL, 0, 2, prctl), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, _PR_SET_PDEATHSIG),
            (_RETURN, 0, 0, _ALLOW), refuse]
    numbers = [n[column] for n in DENIED.values()]
    # from middle[i] to the last instruction: the rest of middle, then all of the tail but that one
    middle = [(_EQUAL, len(numbers) - 1 - i + len(tail) - 1, 0, n) for i, n in enumerate(numbers)]
    return head + middle + tail


def seccomp():
    """Refuse the system calls in DENIED, and clone with new namespaces, for this process and all it starts."""
    if platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {platform.machine()}")
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _program())
    buffer = ctypes.create_string_buffer(code, len(code))
    filter = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    no_new_privileges()
    _call("prctl", _PR_SET_SECCOMP, _FILTER, filter, 0, 0)


# --- the rest --------------------------------------------------------------------------------------------------------



def no_new_privileges():
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with_parent(by=signal.SIGKILL):
    """Get the signal `by` when the process that forked this one ends, however it ends."""
    if _libc is not None:
        _call("prctl", _PR_SET_PDEATHSIG, by, 0, 0, 0)


def no_capabilities():
    """Be an ordinary user in one's own user namespace too: no way to the parts of the kernel that only its root may ask."""
    _call("capset", struct.pack("=Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
    no_new_privileges()     # so that nothing it starts regains them


def limits(policy):
    for kind, value in ((resource.RLIMIT_AS, policy.memory), (resource.RLIMIT_CPU, policy.seconds), (resource.RLIMIT_FSIZE, policy.file_size),
                        (resource.RLIMIT_NPROC, policy.processes), (resource.RLIMIT_NOFILE, policy.files), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def enter(policy, without=()):
    """Confine this process for good. Forks: what returns is the child, init of its own pid namespace; the parent waits for it, ends as it
    ended, and kills it on SIGTERM. `without`: the LAYERS to leave out.
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, the kernel shall not look for it at the grader's
    if "namespaces" not in without:
        leave_namespaces()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = os.fork()
        if child:
            _wait_for(child)
        os.setsid()     # a signal to "my own group" would reach the one who waits
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        own_mounts(policy)
    os.chdir(policy.scratch)
    if "limits" not in without:
        limits(policy)
    if "landlock" not in without:
        landlock([*policy.read, "/proc"], [policy.scratch, "/dev/null", "/dev/zero", "/dev/full"], policy.listed)
    if "namespaces" not in without:
        no_capabilities()
    if "seccomp" not in without:
        seccomp()


def _wait_for(child):
    """The rest of the life of the one who stays outside. All of the namespace ends with `child`, and `child` when this one is told to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    die_with_parent(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.closerange(0, 1 << 12)  # a channel is closed when its last holder is gone, and that shall be the child
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def missing(scratch="/tmp"):
    """{layer: why it cannot be had on this machine}; empty where all of LAYERS hold. Tries each in a process of its own."""
    if _libc is None:
        return {layer: f"{platform.system()} has no such thing" for layer in LAYERS if layer != "limits"}
    found = {}
    for layer in LAYERS:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    enter(Policy(scratch, ("/usr",)), [other for other in LAYERS if other != layer])
                    code = 0
                except Exception as e:
                    os.write(send, str(e).encode()[:500])
            os._exit(code)
        os.close(send)
        with os.fdopen(receive, "rb") as file:
            reason = file.read().decode("utf-8", "replace")
        _, status = os.waitpid(child, 0)
        if status:
            found[layer] = f"{reason or 'the attempt failed without a word'}; {HINTS[layer]}"
    return found
