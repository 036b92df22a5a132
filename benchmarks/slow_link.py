"""What a slow link costs data-parallel training: two machines, biases against full tuning.

    python benchmarks/slow_link.py [--delay-ms 20] [--megabits 100] [--picture docs/slow_link.png]

The two machines are network namespaces of this one (Linux, as root), each with one process that `torchrun` starts by
c10d rendezvous, as configs/accelerate/multi_node.yaml does. "local" joins them by a veth pair, which is as fast as
memory. "link" gives each a TUN device, and a thread for either direction hands every packet over when a line of that
rate and delay would have: what `tc netem delay 20ms rate 100mbit` does at both ends, without that kernel module.
Seconds a step are those of metrics.jsonl without the first steps, bytes those that the device of a machine sent.

Where both machines share a core, or the core is not theirs alone, a step takes longer than on machines of their own,
and the link costs a smaller share of it. The last column takes the processor's time of a step instead. What the link
adds is seen best with --tokens 8, where there is little to compute, and the same to send.
"""

import argparse
import collections
import fcntl
import itertools
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

REPOSITORY = Path(__file__).parents[1]
MACHINES, DEVICE, NETWORK = ("sgpt-link-0", "sgpt-link-1"), "wire", "10.77.0"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h: packets of IP, nothing before them
PACKETS_IN_QUEUE = 1000  # as netem; what comes on top is dropped, and TCP slows down
UNMEASURED = 2  # steps
LINKS = ("local", "link")


@dataclass(frozen=True)
class Row:
    """One run. A step of one machine: seconds, of which the processor computed cpu_seconds, and megabytes sent."""

    tuning: str
    link: str
    seconds: float
    cpu_seconds: float
    megabytes: float
    queries_per_second: float


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--delay-ms", type=float, default=20, help="of each direction (default: %(default)s)")
    arguments.add_argument("--megabits", type=float, default=100, help="a second, of each direction")
    arguments.add_argument("--tunings", nargs="+", default=["bitfit", "full"])
    arguments.add_argument("--model", default="data/nano")
    arguments.add_argument("--data", default="data/raw/pydocs/train.jsonl", help="pairs; harvested by make train")
    arguments.add_argument("--queries", type=int, default=64, help="a step of each machine (default: %(default)s)")
    arguments.add_argument("--tokens", type=int, help="at which texts are cut (default: 48 and 96, the experiment's)")
    arguments.add_argument("--steps", type=int, default=10, help="measured ones (default: %(default)s)")
    arguments.add_argument("--cores", type=int, nargs=2, help="of the two machines (default: the first two)")
    arguments.add_argument("--output", type=Path, help="a JSON file")
    arguments.add_argument("--picture", type=Path, help="a PNG file")
    options = arguments.parse_args()
    available = sorted(os.sched_getaffinity(0))
    cores = options.cores or [available[0], available[1 % len(available)]]
    rows = []
    for tuning, link in itertools.product(options.tunings, LINKS):
        with machines(link, options.delay_ms / 1000, options.megabits * 1e6):
            rows.append(train(tuning, link, cores, options))
            print(rows[-1], flush=True)
    print_table(rows)
    if options.output:
        options.output.write_text(json.dumps({"options": vars(options), "rows": [*map(asdict, rows)]}, default=str))
    if options.picture:
        draw(rows, options)


# ---- two machines


@contextmanager
def machines(link: str, delay: float, bits_per_second: float) -> Iterator[None]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, whose devices are joined; they are removed at the end."""
    for machine in MACHINES:
        run("ip", "netns", "add", machine)
    tunnels: list[int] = []
    directions: list[threading.Thread] = []
    ended = threading.Event()
    try:
        if link == "local":
            ends = [("netns", MACHINES[0]), ("peer", "name", DEVICE, "netns", MACHINES[1])]
            run("ip", "link", "add", DEVICE, *ends[0], "type", "veth", *ends[1])
        else:
            tunnels = [tunnel(machine) for machine in MACHINES]
        for number, machine in enumerate(MACHINES, start=1):
            run("ip", "-n", machine, "addr", "add", f"{NETWORK}.{number}/24", "dev", DEVICE)
            run("ip", "-n", machine, "link", "set", DEVICE, "up")
            run("ip", "-n", machine, "link", "set", "lo", "up")
        for receive, send in (tunnels, tunnels[::-1]) if tunnels else ():
            arguments = (receive, send, delay, bits_per_second, ended)
            directions.append(threading.Thread(target=forward, args=arguments))
            directions[-1].start()
        yield
    finally:
        ended.set()
        for direction in directions:
            direction.join()
        for machine in MACHINES:
            run("ip", "netns", "delete", machine)
        for end in tunnels:
            os.close(end)


def tunnel(machine: str) -> int:
    """A TUN device in that namespace; what is read from this file it sends, what is written it receives."""
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    run("ip", "link", "set", DEVICE, "netns", machine)
    return end


def forward(receive: int, send: int, delay: float, bits_per_second: float, ended: threading.Event) -> None:
    """Each packet waits until those before it are on the line, takes its own bits' time, and the delay."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)  # of this thread: a line does not wait for a core
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    line_is_free = 0.0
    while not ended.is_set():
        next_is_due = waiting[0][0] - time.monotonic() if waiting else 0.1
        ready, _, _ = select.select([receive], [], [], min(0.1, max(0.0, next_is_due)))
        now = time.monotonic()
        if ready:
            packet = os.read(receive, 65_536)
            if len(waiting) < PACKETS_IN_QUEUE:
                line_is_free = max(line_is_free, now) + 8 * len(packet) / bits_per_second
                waiting.append((line_is_free + delay, packet))
        while waiting and waiting[0][0] <= now:
            os.write(send, waiting.popleft()[1])


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- one run


def train(tuning: str, link: str, cores: Sequence[int], options: argparse.Namespace) -> Row:
    """Trains on both machines and reads the log of the run."""
    steps = UNMEASURED + options.steps
    with tempfile.TemporaryDirectory(prefix="sgpt-slow-link-") as folder:
        overrides = [
            "experiment=pydocs", "data=file", f"data.path={Path(options.data).resolve()}", "data.num_hard_negatives=1",
            f"data.cache={folder}/cache", "evaluation.retrieval=[]", "dev.retrieval=[]", "trainer.threads=1",
            f"model.path={options.model}", f"tuning={tuning}", f"trainer.queries_per_process={options.queries}",
            f"trainer.max_steps={steps}", f"trainer.log_every_steps={UNMEASURED}", f"runs={folder}", "name=run",
        ]  # fmt: skip
        if options.tokens:
            overrides += [f"markers.{role}_max_tokens={options.tokens}" for role in ("query", "document")]
        messages = open(Path(folder, "messages"), "w+")  # noqa: SIM115
        processes = [start(number, core, overrides, messages) for number, core in enumerate(cores)]
        log = Path(folder, "run", "metrics.jsonl")
        marks = [(0.0, 0.0)]  # bytes sent and seconds computed until each line of the log
        while any(process.poll() is None for process in processes):
            lines = log.read_text().count("\n") if log.is_file() else 0
            if lines >= len(marks):  # of the machine that does nothing else
                marks.append((sent_bytes(MACHINES[1]), cpu_seconds(processes[1])))
            time.sleep(0.1)
        if any(process.returncode for process in processes):
            raise SystemExit(f"{tuning}, {link}: training failed\n{Path(messages.name).read_text()}")
        measured = [json.loads(line) for line in log.read_text().splitlines()]
    steps = measured[-1]["step"] - measured[0]["step"]
    seconds = (measured[-1]["seconds"] - measured[0]["seconds"]) / steps
    sent, computed = ((last - first) / steps for first, last in zip(marks[1], marks[-1], strict=True))
    return Row(tuning, link, seconds, computed, sent / 1e6, 2 * options.queries / seconds)


def start(number: int, core: int, overrides: list[str], messages: IO) -> subprocess.Popen:
    """torchrun on one machine."""
    own = f"{NETWORK}.{number + 1}"
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-id", "slow-link", "--rdzv-endpoint", f"{NETWORK}.1:29500",
        "--rdzv-conf", f"is_host={number == 0}", "--local-addr", own, "train/biencoder.py",
    ]  # fmt: skip
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": DEVICE, "TP_SOCKET_IFNAME": DEVICE,
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["ip", "netns", "exec", MACHINES[number], "taskset", "-c", str(core), *torchrun, *overrides]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=messages, stderr=messages)


def cpu_seconds(process: subprocess.Popen) -> float:
    """Of the process and all that it started."""
    first = psutil.Process(process.pid)
    times = [one.cpu_times() for one in (first, *first.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def sent_bytes(machine: str) -> float:
    (device,) = json.loads(run("ip", "-n", machine, "-s", "-j", "link", "show", "dev", DEVICE))
    return device["stats64"]["tx"]["bytes"]


# ---- what it says


def share_kept(local: Row, linked: Row, *, core_each: bool = False) -> float:
    """Of the local speed. core_each: as it would be where each machine computes undisturbed."""
    alone = local.cpu_seconds if core_each else local.seconds
    return alone / (alone + max(0.0, linked.seconds - local.seconds))


def pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """For each tuning its local run and that over the link."""
    yield from zip(rows[::2], rows[1::2], strict=True)


def print_table(rows: list[Row]) -> None:
    headings = ("local s/step", "link s/step", "CPU s/step", "MB sent", "kept", "core each")
    print(" " * 8 + "".join(f"{heading:>13}" for heading in headings))
    for local, linked in pairs(rows):
        kept, of_own = share_kept(local, linked), share_kept(local, linked, core_each=True)
        times = "".join(f"{seconds:13.2f}" for seconds in (local.seconds, linked.seconds, local.cpu_seconds))
        print(f"{local.tuning:8}{times}{linked.megabytes:13.2f}{kept:13.0%}{of_own:13.0%}")


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.6))
    labels, colors = {"bitfit": "biases", "full": "all weights"}, {"local": "#9db8d3", "link": "#3b6ea5"}
    heights = range(len(rows))
    axes.barh(heights, [row.queries_per_second for row in rows], color=[colors[row.link] for row in rows], height=0.7)
    line = f"{options.delay_ms:g} ms, {options.megabits:g} Mbit/s"
    names = [f"{labels.get(row.tuning, row.tuning)}, {'local' if row.link == 'local' else line}" for row in rows]
    axes.set_yticks(heights, names)
    axes.invert_yaxis()
    for number, (local, linked) in enumerate(pairs(rows)):
        text = f" {share_kept(local, linked):.0%} of local, {linked.megabytes:.2f} MB a step"
        axes.text(linked.queries_per_second, 2 * number + 1, text, va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max(row.queries_per_second for row in rows))
    axes.set_xlabel("queries a second, two machines")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.picture, dpi=110)
    print(options.picture)


if __name__ == "__main__":
    main()
