"""A network card that damages what it sends: bad_cable.py INTERFACE EVERY, as root inside a machine of a cluster.

The interface's frames go through this process: a TAP device takes its name, its addresses and its MAC address, and the
real one carries the frames. In every EVERY-th full one that leaves, two 16-bit words of the payload change places, as
by a fault in a card's memory: TCP's checksum, which is a sum of such words, does not see it, so that a program reads
wrong bytes. Prints a line when it is in place; runs until it is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys

IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, TUNSETIFF = 0x0002, 0x1000, 0x4000, 0x400454CA
SOL_PACKET, PACKET_VNET_HDR = 263, 15
FULL_BYTES = 1400  # of a frame: only what moves much data sends such ones in a row
_WORDS_AT = (700, 702)  # in the frame: well behind all headers
_MOST_BYTES = 1 << 17


def damaged(frame: bytes) -> bytes:
    """`frame` with two of its words exchanged."""
    a, b = _WORDS_AT
    return frame[:a] + frame[b : b + 2] + frame[a : a + 2] + frame[b + 2 :]


def take_place_of(interface: str) -> tuple[int, socket.socket]:
    """The TAP device that programs of this machine now see as `interface`, and the real one."""
    shown = json.loads(_ip("-json", "address", "show", "dev", interface))[0]
    addresses = [f"{found['local']}/{found['prefixlen']}" for found in shown["addr_info"] if found["family"] == "inet"]
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", b"placeholder", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    real = "real"
    _ip("link", "set", interface, "down")
    _ip("address", "flush", "dev", interface)
    _ip("link", "set", interface, "name", real)
    _ip("link", "set", real, "address", "02:00:00:00:00:01", "arp", "off")  # nobody speaks to it by itself
    _ip("link", "set", "placeholder", "name", interface, "address", shown["address"])
    for address in addresses:
        _ip("address", "add", address, "dev", interface)
    _ip("link", "set", real, "promisc", "on", "up")
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
    # Before each frame a header that says what the sender has left to its card, whose part the next one has to do:
    # frames come in larger than the cable takes, and without sums.
    wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    wire.bind((real, 0))
    _ip("link", "set", interface, "up")
    return tap, wire


def carry(tap: int, wire: socket.socket, every: int) -> None:
    full = 0
    while True:
        for ready in select.select([tap, wire], [], [])[0]:
            if ready is tap:
                frame = os.read(tap, _MOST_BYTES)
                if len(frame) >= FULL_BYTES:
                    full += 1
                    frame = damaged(frame) if full % every == 0 else frame
                wire.send(frame)
            else:
                frame, sender = wire.recvfrom(_MOST_BYTES)
                if sender[2] != socket.PACKET_OUTGOING:
                    os.write(tap, frame)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    ends = take_place_of(sys.argv[1])
    print("in place", flush=True)
    carry(*ends, int(sys.argv[2]))
