# SPDX-License-Identifier: Apache-2.0
"""System calls that no program on a test has a use for: one of them ends it.

A program is one process that reads and writes. It starts no other program and no other process, opens no socket, and
asks the kernel for nothing that is new or for administrators. Walls would contain most of that; ended at once, a
program that also prints the right answer does not pass with it.
"""

import platform
import struct

# AUDIT_ARCH of linux/audit.h, and numbers of asm/unistd.h.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ENDED = {
    "x86_64": {
        "socket": 41, "execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "kill": 62, "tkill": 200, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "mount": 165, "umount2": 166, "pivot_root": 155,
        "chroot": 161, "unshare": 272, "setns": 308, "keyctl": 250, "add_key": 248, "request_key": 249, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "memfd_create": 319, "shmget": 29, "msgget": 68, "semget": 64,
        "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "reboot": 169, "swapon": 167,
        "swapoff": 168, "open_by_handle_at": 304, "name_to_handle_at": 303, "rt_sigqueueinfo": 129,
        "rt_tgsigqueueinfo": 297,
    },
    "aarch64": {
        "socket": 198, "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "ptrace": 117,
        "process_vm_readv": 270, "process_vm_writev": 271, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
        "unshare": 97, "setns": 268, "keyctl": 219, "add_key": 217, "request_key": 218, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "memfd_create": 279, "shmget": 194, "msgget": 186, "semget": 190,
        "init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104, "reboot": 142, "swapon": 224,
        "swapoff": 225, "open_by_handle_at": 265, "name_to_handle_at": 264, "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240,
    },
}  # fmt: skip
# The same numbers on every architecture, since Linux 5.0.
_ENDED_EVERYWHERE = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "pidfd_open": 434, "pidfd_getfd": 438,
    "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_CLONE, _CLONE3, _CLONE_THREAD = {"x86_64": 56, "aarch64": 220}, 435, 0x10000
_X32 = 0x40000000  # numbers of x86-64's other interface

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_END, _ALLOW, _NOT_THERE = 0x80000000, 0x7FFF0000, 0x00050000 | 38  # ENOSYS
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # places in struct seccomp_data


def filter_of_this_machine() -> bytes:
    """The filter as seccomp(2) takes it, an array of ``struct sock_filter``; empty on an architecture not listed."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return b""
    end = (_RETURN, 0, 0, _END)
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), end, (_LOAD, 0, 0, _NUMBER)]
    if machine == "x86_64":
        steps += [(_AT_LEAST, 0, 1, _X32), end]
    for number in sorted({*_ENDED[machine].values(), *_ENDED_EVERYWHERE.values()}):
        steps += [(_EQUAL, 0, 1, number), end]
    # Its flags lie in memory, where a filter cannot read: without it the C library starts threads with clone.
    steps += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _NOT_THERE)]
    steps += [(_EQUAL, 0, 3, _CLONE[machine]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 1, 0, _CLONE_THREAD), end]
    steps += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
