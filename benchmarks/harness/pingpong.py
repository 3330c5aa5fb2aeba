"""Round trips of four bytes over TCP, in seconds, one on each line.

usage: python pingpong.py echo ADDRESS PORT | python pingpong.py ask ADDRESS PORT COUNT
"""

import socket
import sys
import time

MESSAGE = b"ping"


def echo(address: str, port: int) -> None:
    """Say that it listens, then send back what one caller sends, until it hangs up."""
    with socket.create_server((address, port)) as server:
        print("ready", flush=True)
        caller, _ = server.accept()
        with caller:
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while got := caller.recv(len(MESSAGE)):
                caller.sendall(got)


def ask(address: str, port: int, count: int) -> None:
    """Print the time of each of ``count`` round trips."""
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            start = time.perf_counter()
            connection.sendall(MESSAGE)
            left = len(MESSAGE)
            while left:
                left -= len(connection.recv(left))
            print(time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo(sys.argv[2], int(sys.argv[3]))
    else:
        ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
