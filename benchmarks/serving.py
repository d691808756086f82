"""Serving: throughput, waiting time, a storm of requests, and how fast a full queue refuses.

    python benchmarks/serving.py throughput [--model digits|DiT-S/4] [--rounds 5] [--device cuda]
    python benchmarks/serving.py latency --model small [--requests 60] [--rounds 3]
    python benchmarks/serving.py storm [--requests 10000] [--clients 24]
    python benchmarks/serving.py refusal [--requests 300]

throughput: 16 requests of 5 step counts, 3 solvers, 4 guidance scales and different classes at once, through the whole
server (HTTP in the same process, queue, files), against the same requests one after the other: loops of diffusers'
pipelines around its own transformer and schedulers, and `tessera.generate`. All start from noise and end with PNGs. CPU
time of the process, one thread, the ways in turns; on a GPU wall time, and the images per second.
latency: requests of 10 steps, one in ten of 250, at Poisson times that keep a first-in-first-out server busy for 70 %
of the time; the same server with and without one request at a time. Wall time of the short ones. Then the scheduler
alone in virtual time, with the CPU time of calls as measured: other programs on the machine do not change it.
storm: a server process with a tiny network on loopback; a fifth of the clients leave early, 5 % send what is not valid.
refusal: the time of 429 answers of a server process whose queue is full.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import tessera
from tessera import bundle, generation
from tessera.bundle import BundleConfig
from tessera.generation import ContinuousSampler, SampleRequest
from tessera.images import to_png
from tessera.serving.admission import Limits
from tessera.serving.app import create_app
from tessera.serving.models import ModelEntry
from tessera.serving.scheduler import RowScheduler
from tessera.serving.service import Service, ServiceOptions
from tessera.settings import read_yaml
from tessera.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
STEPS, SOLVERS, SCALES = [10, 15, 20, 30, 40], ["ddim", "dpm++", "unipc"], [1.0, 2.0, 3.0, 4.0]
GENERATIONS = "/v1/images/generations"


def make_model(name: str, device: str = "cpu") -> tessera.Model:
    """An untrained model: of the digits recipe, a tiny one, or a preset on latents, which are taken as pixels."""
    if name == "digits":
        recipe = Recipe.model_validate({**read_yaml(ROOT / "recipes/digits.yaml"), "run_dir": "unused"})
        sizes = {"input_size": (8, 8), "in_channels": 1, "num_classes": 10, "out_channels": 2}
        network = recipe.network.model_copy(update=sizes).model_dump()
        network |= {"kind": "dit", "block": "adaln-zero"}
    elif name == "small":
        network = {"kind": "dit", "patch_size": 2, "depth": 4, "hidden_size": 96, "num_heads": 4, "input_size": 8}
        network |= {"in_channels": 1, "out_channels": 2, "num_classes": 10}
    elif name == "tiny":
        network = {"kind": "dit", "patch_size": 4, "depth": 1, "hidden_size": 16, "num_heads": 1, "input_size": 8}
        network |= {"in_channels": 1, "out_channels": 1, "num_classes": 10}
    else:
        network = {"preset": name, "in_channels": 3, "out_channels": 6, "input_size": 32, "num_classes": 1000}
    learned = network.get("out_channels") != network.get("in_channels")
    config = BundleConfig.model_validate(
        {
            "network": {**network, "timestep_freq_divisor": 127, "mlp_norm_eps": 1e-5},
            "diffusion": {"kind": "gaussian", "variance": "learned" if learned else "beta"},
            "codec": {"kind": "pixels", "channels": network["in_channels"]},
        }
    )
    torch.manual_seed(0)
    built = config.network.build()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return tessera.Model(config, built.eval().to(device))


def mixed_bodies(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": str(number % 10),
            "seed": number,
            "num_steps": STEPS[number % 5],
            "sampler": SOLVERS[number % 3],
            "guidance_scale": SCALES[number % 4],
        }
        for number in range(count)
    ]


@contextlib.asynccontextmanager
async def serving(model: tessera.Model, **options: Any) -> Any:
    """A client of a server in this process."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service([ModelEntry("model", "model", lambda: model)], ServiceOptions(Path(folder), **options))
        app = create_app(service)
        await service.start()
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
            yield client
        await service.close()


async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await client.post(GENERATIONS, json=body)
    assert answer.status_code == 200, answer.text


def one_by_one(model: tessera.Model, bodies: list[dict[str, Any]]) -> None:
    for body in bodies:
        settings = {"num_steps": body["num_steps"], "sampler": body["sampler"]}
        request = SampleRequest([body["seed"]], {"label": [body["prompt"]]}, body["guidance_scale"], settings=settings)
        to_png(generation.generate_request(model, request)[0])


def diffusers_loops(model: tessera.Model) -> Any:
    """The loops of diffusers' DiTPipeline with equal weights, one request after the other."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    from tessera.interop.diffusers import to_diffusers, transformer_config

    network = model.network
    transformer = DiTTransformer2DModel(**transformer_config(network.config).model_dump(exclude={"class_name"}))
    transformer.load_state_dict(to_diffusers(network.state_dict(), network.config))
    transformer.eval().to(model.device)
    shape, null = (network.config.in_channels, *network.config.input_size), network.config.num_classes
    schedulers = {
        "ddim": lambda: DDIMScheduler(clip_sample=False),
        "dpm++": lambda: DPMSolverMultistepScheduler(solver_order=2),
        "unipc": lambda: UniPCMultistepScheduler(solver_order=2),
    }

    @torch.no_grad()
    def run(bodies: list[dict[str, Any]]) -> None:
        channels = shape[0]
        for body in bodies:
            scheduler, scale = schedulers[body["sampler"]](), body["guidance_scale"]
            scheduler.set_timesteps(body["num_steps"], device=model.device)
            x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(body["seed"])).to(model.device)
            labels = torch.tensor([int(body["prompt"]), null] if scale > 1 else [int(body["prompt"])]).to(model.device)
            for t in scheduler.timesteps:
                inputs = scheduler.scale_model_input(torch.cat([x, x]) if scale > 1 else x, t)
                raw = transformer(inputs, t[None].expand(len(inputs)), labels).sample[:, :channels]
                if scale > 1:
                    cond, uncond = raw.chunk(2)
                    raw = uncond + scale * (cond - uncond)
                x = scheduler.step(raw, t, x).prev_sample
            pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)[0].movedim(0, -1)
            to_png(pixels.cpu().numpy())

    return run


async def throughput(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, bodies = make_model(options.model, options.device), mixed_bodies(options.requests or 16)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    bodies = [{**body, "num_steps": max(1, body["num_steps"] // options.shorter)} for body in bodies]
    theirs = diffusers_loops(model)
    seconds: dict[str, list[float]] = {"the server": [], "tessera, one by one": [], "diffusers, one by one": []}
    rows = len(bodies) + 1
    async with serving(model, limits=Limits(max_queue=rows)) as client:
        for number in range((options.rounds or 5) + 1):
            for name, values in seconds.items():
                start = clock()
                if name == "the server":
                    await asyncio.gather(*(post(client, body) for body in bodies))
                else:
                    await asyncio.to_thread(
                        one_by_one, model, bodies
                    ) if "tessera" in name else await asyncio.to_thread(theirs, bodies)
                if number:  # the first round is a warm-up
                    values.append(clock() - start)
    ours = statistics.median(seconds["the server"])
    print(f"{model.config.network.summary()}, {len(bodies)} requests, torch {torch.__version__}\n")
    unit = "CPU ms" if options.device == "cpu" else "ms"
    print(f"| way | {unit} | images/s | times the server (median of rounds) |\n|---|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / server for value, server in zip(values, seconds["the server"])]
        median = statistics.median(values)
        print(f"| {name} | {1000 * median:.0f} | {len(bodies) / median:.1f} | {statistics.median(ratios):.2f} |")
    assert ours > 0


LONG, SHORT = 250, 10  # steps
WAYS = ("first in, first out", "shared")


def steps_of(number: int) -> int:
    return LONG if number % 10 == 4 else SHORT


def summary(times: Sequence[float]) -> tuple[float, float, float]:
    """Median and 95th percentile of the short requests, and the mean of the long ones."""
    short = [seconds for number, seconds in enumerate(times) if steps_of(number) == SHORT]
    long = [seconds for number, seconds in enumerate(times) if steps_of(number) == LONG]
    return float(np.percentile(short, 50)), float(np.percentile(short, 95)), statistics.mean(long)


def print_latencies(rounds: Sequence[dict[str, tuple[float, float, float]]]) -> None:
    print("| round | first in, first out: median, p95 of short; mean of long (s) | shared | p95, shared / fifo |")
    print("|---|---|---|---|")
    ratios = []
    for number, results in enumerate(rounds):
        fifo, shared = (results[name] for name in WAYS)
        ratios.append(shared[1] / fifo[1])
        cells = [", ".join(f"{value:.3f}" for value in values) for values in (fifo, shared)]
        print(f"| {number} | {cells[0]} | {cells[1]} | {ratios[-1]:.3f} |")
    print(f"\nmedian ratio {statistics.median(ratios):.3f}")


async def latency(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    count, model, rounds = options.requests or 60, make_model(options.model), []
    async with serving(model, limits=Limits(max_queue=count + 1)) as client:

        async def request(number: int) -> None:
            body = {"prompt": str(number % 10), "seed": number, "num_steps": steps_of(number), "guidance_scale": 2.0}
            await post(client, body)

        async def one(number: int, arrival: float, begin: float, lock: asyncio.Lock | None) -> float:
            await asyncio.sleep(begin + arrival - time.perf_counter())
            async with lock or contextlib.nullcontext():
                await request(number)
            return time.perf_counter() - begin - arrival

        await request(0)
        for number in range(options.rounds or 3):
            start = time.perf_counter()  # in every round, since other programs may slow the machine down
            for each in range(10):
                await request(each)
            interval = (time.perf_counter() - start) / 10 / options.busy
            arrivals, results = np.random.default_rng(number).exponential(interval, count).cumsum(), {}
            for name in WAYS if number % 2 else reversed(WAYS):
                lock, begin = asyncio.Lock() if name == WAYS[0] else None, time.perf_counter()
                times = await asyncio.gather(*(one(n, arrival, begin, lock) for n, arrival in enumerate(arrivals)))
                results[name] = summary(times)
            rounds.append(results)
            print(f"round {number}: a request each {1000 * interval:.0f} ms on average", file=sys.stderr)
    print(f"{model.config.network.summary()}, {count} requests\n")
    print_latencies(rounds)
    sizes, seconds = measure_calls(model)
    costs = ", ".join(f"{size}: {1000 * value:.2f}" for size, value in zip(sizes, seconds))
    print(f"\nReplay of {options.replayed} requests. CPU ms of a network call by its evaluations: {costs}\n")
    print_latencies([replay(sizes, seconds, options.replayed, options.busy, seed) for seed in range(3)])


def measure_calls(model: tessera.Model) -> tuple[list[int], list[float]]:
    """Evaluations in a call, and the median of the CPU seconds of a step with so many, solver and guidance included."""
    sizes, medians = [2, 4, 8, 16, 32, 64], []
    for size in sizes:
        sampler, times = ContinuousSampler(model), []
        request = SampleRequest(list(range(size // 2)), {"label": [1]}, 2.0, settings={"num_steps": 12})
        sampler.add(request, list(range(size // 2)))
        for _ in range(11):
            start = time.thread_time()
            sampler.step()
            times.append(time.thread_time() - start)
        medians.append(statistics.median(times[1:]))
    return sizes, medians


def replay(
    sizes: list[int], seconds: list[float], count: int, busy: float, seed: int
) -> dict[str, tuple[float, float, float]]:
    """The scheduler of the server in virtual time, with measured costs of calls, and one request after the other."""

    def cost(evaluations: int) -> float:
        return float(np.interp(evaluations, sizes, seconds))

    services = [steps_of(number) * cost(2) for number in range(count)]
    arrivals = np.random.default_rng(seed).exponential(statistics.mean(services) / busy, count).cumsum()
    fifo, free = [], 0.0
    for arrival, service in zip(arrivals, services):
        free = max(free, arrival) + service
        fifo.append(free - arrival)
    scheduler, now, left = RowScheduler(max_evaluations=sizes[-1]), 0.0, {}
    shared, number = [0.0] * count, 0
    while number < count or left:
        now = now if left else max(now, arrivals[number])
        while number < count and arrivals[number] <= now:
            left[number] = steps_of(number)
            scheduler.add("client", "key", number, number, evaluations=2)
            number += 1
        call = scheduler.choose()
        assert call is not None
        now += cost(call.evaluations)
        scheduler.charge(call, cost(call.evaluations))
        for name in call.names:
            left[name] -= 1
            if not left[name]:
                del left[name]
                scheduler.remove(name)
                shared[name] = now - arrivals[name]
    return {WAYS[0]: summary(fifo), WAYS[1]: summary(shared)}


@contextlib.contextmanager
def server_process(*words: str) -> Iterator[tuple[str, int, Path]]:
    """A server with the tiny model on loopback: its address, process id and output folder."""
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(make_model("tiny"), Path(folder) / "tiny")
        command = [sys.executable, "-m", "tessera", "serve", str(Path(folder) / "tiny"), "--port", "0"]
        command += ["--out", str(Path(folder) / "out"), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = (Path(folder) / "log").open("w")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT)
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            while True:
                if process.poll() is not None:
                    raise SystemExit((Path(folder) / "log").read_text())
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{address}/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield address, process.pid, Path(folder) / "out"
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
            print(f"the server ended with code {code}")


def memory(pid: int) -> float:
    """Resident MiB of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


MALFORMED: list[dict[str, Any]] = [
    {"content": b"{"}, {"json": {"prompt": "no digit"}}, {"json": {"prompt": "1", "n": 99}}, {"json": []},
    {"json": {"prompt": "1", "hue": 3}}, {"content": b"\xff" * 100}, {"json": {"prompt": "1", "size": "7x7"}},
]  # fmt: skip


async def storm(options: argparse.Namespace) -> None:
    count, chance = options.requests or 10_000, random.Random(0)
    kinds = [chance.choices(["served", "leaves", "malformed"], [75, 20, 5])[0] for _ in range(count)]
    statuses: Counter[str] = Counter()
    jobs: list[str] = []
    samples: list[float] = []
    with server_process("--max-queue", "32") as (address, pid, out):
        numbers = iter(range(count))
        start = time.perf_counter()

        async def client_loop() -> None:
            limits = httpx.Limits(max_keepalive_connections=1)
            async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
                for number in numbers:
                    if number % (count // 20 or 1) == 0:
                        samples.append(memory(pid))
                    await one(client, number)

        async def one(client: httpx.AsyncClient, number: int) -> None:
            kind = kinds[number]
            body = {"prompt": str(number % 10), "seed": number, "num_steps": 1 + number % 4, "sampler": "ddim"}
            if kind == "malformed":
                answer = await client.post(GENERATIONS, **MALFORMED[number % len(MALFORMED)])
            elif kind == "leaves":
                try:
                    wait = chance.choice([0.001, 0.005, 0.02])
                    answer = await asyncio.wait_for(client.post(GENERATIONS, json={**body, "num_steps": 50}), wait)
                except TimeoutError:
                    statuses["left"] += 1
                    return
            else:
                answer = await client.post(GENERATIONS, json=body)
                while answer.status_code == 429:
                    statuses["429, tried again"] += 1
                    await asyncio.sleep(0.05)
                    answer = await client.post(GENERATIONS, json=body)
            statuses[f"{kind}: {answer.status_code}"] += 1
            if answer.status_code == 200:
                jobs.append(answer.json()["job"])
                assert answer.json()["data"][0]["seed"] == number

        await asyncio.gather(*(client_loop() for _ in range(options.clients)))
        seconds = time.perf_counter() - start
        await asyncio.sleep(1)
        samples.append(memory(pid))
        records = [json.loads(path.read_text()) for path in out.glob("jobs/*/job.json")]
        metrics = httpx.get(f"{address}/metrics").text
    states = Counter(record["state"] for record in records)
    finished = {record["id"] for record in records if record["state"] == "finished"}
    print(f"{count} requests in {seconds:.0f} s by {options.clients} clients: {dict(sorted(statuses.items()))}")
    print(f"jobs in the folder: {dict(states)}; answered {len(jobs)}, different {len(set(jobs))}")
    print(f"memory (MiB): {', '.join(f'{value:.0f}' for value in samples)}")
    lost = set(jobs) - finished
    errors = sum(number for name, number in statuses.items() if ": 5" in name)
    active = [line for line in metrics.splitlines() if line.startswith(("tessera_jobs_running", "tessera_jobs_sub"))]
    print(f"lost {len(lost)}, doubled {len(jobs) - len(set(jobs))}, 5xx {errors}; {'; '.join(active)}")
    wanted = sum(kind == "served" for kind in kinds)
    assert statuses["served: 200"] == wanted
    assert not lost
    assert len(jobs) == len(set(jobs))
    assert not errors
    assert not states["running"] + states["submitted"] + states["failed"]


async def refusal(options: argparse.Namespace) -> None:
    with server_process("--max-queue", "2") as (address, _, _):
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            long = {"condition": {"label": ["1"]}, "seeds": list(range(900)), "settings": {"num_steps": 1000}}
            jobs = [(await client.post("/v1/jobs", json=long)).json()["id"] for _ in range(2)]
            times = []
            for _ in range(options.requests or 300):
                start = time.perf_counter()
                answer = await client.post(GENERATIONS, json={"prompt": "1"})
                times.append(time.perf_counter() - start)
                assert answer.status_code == 429
            for job in jobs:
                await client.post(f"/v1/jobs/{job}/cancel")
    median, p95 = 1000 * statistics.median(times), 1000 * float(np.percentile(times, 95))
    print(f"refused with 429 in {median:.2f} ms (median), {p95:.2f} ms (p95), while two jobs run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "latency", "storm", "refusal"])
    parser.add_argument("--model", default="digits", help="digits, small, tiny or a preset such as DiT-S/4")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of throughput")
    parser.add_argument("--requests", type=int, help="16, 60, 10000 or 300")
    parser.add_argument("--shorter", type=int, default=1, help="throughput: divide the step counts, 10 to 40, by this")
    parser.add_argument("--rounds", type=int, help="throughput: 5, latency: 3")
    parser.add_argument("--replayed", type=int, default=2000, help="requests of the replay in virtual time")
    parser.add_argument("--clients", type=int, default=24, help="at once, of the storm")
    parser.add_argument("--busy", type=float, default=0.7, help="utilization of the first-in-first-out server")
    options = parser.parse_args()
    asyncio.run(globals()[options.what](options))


if __name__ == "__main__":
    main()
