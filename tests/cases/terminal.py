#!/usr/bin/env python3
"""Runs a command on a terminal of its own and prints what the terminal shows at the end, a line a line.

    terminal.py [--columns N] [--out FILE] [--keys TEXT] COMMAND...

--out: standard output goes to this file and not to the terminal; `-`: through a pipe to a reader on the same terminal.
--keys: lines that are typed, each when the terminal has been quiet for a second. Codes that the emulation does not know, colours among them, are shown
as <ESC...>. The exit code is the command's.
"""
import argparse
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time


class Terminal:
    def __init__(self, columns):
        self.columns, self.lines, self.row, self.column, self.wraps = columns, [[]], 0, 0, True

    def put(self, text):
        if self.column >= self.columns:
            if not self.wraps:
                self.column = self.columns - 1
            else:
                self.feed()
                self.column = 0
        line = self.lines[self.row]
        line.extend([" "] * (self.column + 1 - len(line)))
        line[self.column] = text
        self.column += 1

    def feed(self):
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def code(self, code):
        line = self.lines[self.row]
        number = int(re.sub(r"\D", "", code) or 0)
        if code in ("[2K",):
            line.clear()
        elif code in ("[K", "[0K"):
            del line[self.column :]
        elif code in ("[J", "[0J"):
            del line[self.column :], self.lines[self.row + 1 :]
        elif code in ("[?7l", "[?7h"):
            self.wraps = code.endswith("h")
        elif code in ("[?2004h", "[?2004l", "[?25h", "[?25l"):
            pass
        elif re.fullmatch(r"\[\d*A", code):
            self.row = max(0, self.row - max(number, 1))
        elif re.fullmatch(r"\[\d*C", code):
            self.column = min(self.columns - 1, self.column + max(number, 1))
        else:
            for c in f"<ESC{code}>":
                self.put(c)

    def write(self, text):
        for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\x1b.|[\s\S]", text):
            if piece[0] == "\x1b":
                self.code(piece[1:])
            elif piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.feed()
            elif piece == "\b":
                self.column = max(0, self.column - 1)
            elif piece != "\a":
                self.put(piece)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--columns", type=int, default=80)
    parser.add_argument("--out")
    parser.add_argument("--keys", default="")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, args.columns, 0, 0))
        os.environ.pop("COLUMNS", None)
        os.environ.setdefault("TERM", "xterm")
        command = args.command
        if args.out == "-":
            command = ["bash", "-c", '"$@" | cat; exit ${PIPESTATUS[0]}', "bash", *command]
        elif args.out:
            file = os.open(args.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
        os.execvp(command[0], command)
    text, keys, deadline = b"", args.keys.encode().splitlines(True), time.time() + 120
    while True:
        if time.time() > deadline:
            os.kill(pid, signal.SIGKILL)
        if not select.select([terminal], [], [], 1)[0]:
            if keys and text:
                os.write(terminal, keys.pop(0).replace(b"\n", b"\r"))
            continue
        try:
            new = os.read(terminal, 65536)
        except OSError:
            break
        if not new:
            break
        text += new
    screen = Terminal(args.columns)
    screen.write(text.decode(errors="replace"))
    print("\n".join("".join(line).rstrip() for line in screen.lines))
    status = os.waitpid(pid, 0)[1]
    sys.exit(os.waitstatus_to_exitcode(status) & 255)


main()
