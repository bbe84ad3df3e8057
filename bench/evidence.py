"""
The study of stage two (docs/evidence.md): which second stage makes the SFT policy walk better, at
about equal CPU minutes? Every run starts from an SFT policy and is evaluated on the same 1,200
greedy walks in 300 houses that no policy has seen.

The list below is run by two lanes of one thread each. What is done is skipped, so that the same
command goes on after an interruption; a training resumes from its last state. The settings of the
first rows were chosen on val_seen and on a prototype with other houses, before the 300 houses were
drawn; the learning rate of own_high later, on 200 other houses.

Run it   python bench/evidence.py --list             every job, and whether it is done
         python bench/evidence.py                    all of them: many hours
         python bench/evidence.py --rows expert own --seeds 0
         python bench/evidence_table.py              the tables, from docs/evidence/
Reads    nothing
Writes   evidence/ (data, checkpoints, results, minutes.jsonl); docs/evidence/RUN.jsonl.gz, what
         happened in each episode of a run, and docs/evidence/minutes.json
"""
from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK, OUT = os.path.join(ROOT, "evidence"), os.path.join(ROOT, "docs", "evidence")
CPU = "--device cpu --dtype float32 --beta2 0.99"
LEARN = f"{CPU} --batch-size 64 --steps-per-walk 4 --val-every 1000 --save-every 1000"
MEMORY = "--memory-budget 4 --memory-recent 4"
GRPO = f"{CPU} --batch-size 64 --gamma 0.5 --scale-rewards none --val-every 50 --save-every 50"
EXPERT = "evidence/vln_ego/train"
KEPT = ("episode_id", "scene_id", "end", "steps", "success", "spl", "sdtw", "distance_to_goal")

# Stage two of each row: script and flags. {own}: own walks of the policy that it starts from.
ROWS = {
    "expert": f"grpo.py --data {EXPERT} --lr 1e-4 --prompts 6400 {GRPO}",
    "own": f"grpo.py --data {{own}} --lr 1e-4 --prompts 6400 {GRPO}",
    "own_long": f"grpo.py --data {{own}} --lr 1e-4 --prompts 19200 {GRPO}",
    "sft": f"sft.py --data {EXPERT} --lr 3e-4 --max-steps 400 {MEMORY} {LEARN}",
    "dagger": f"sft.py --data {EXPERT} {{own}} --lr 3e-4 --max-steps 400 {MEMORY} {LEARN}",
    "dagger_half": f"sft.py --data {EXPERT} {{own}} --shares 1 1 --lr 3e-4 --max-steps 400 "
                   f"{MEMORY} {LEARN}",
    "dagger_low": f"sft.py --data {EXPERT} {{own}} --lr 1e-4 --max-steps 400 {MEMORY} {LEARN}",
    "dagger_high": f"sft.py --data {EXPERT} {{own}} --lr 1e-3 --max-steps 400 {MEMORY} {LEARN}",
    "expert_high": f"grpo.py --data {EXPERT} --lr 3e-4 --prompts 6400 {GRPO}",
    "own_high": f"grpo.py --data {{own}} --lr 3e-4 --prompts 6400 {GRPO}",
    "own_simulator": f"bench/simulator_reward.py --data {{own}} --lr 3e-4 --prompts 6400 {GRPO}",
}
# The paper's ablations of stage two: the reward, and plans per prompt (own_high: tdr and 8).
ROWS |= {f"reward_{reward}": f"{ROWS['own_high']} --reward {reward}"
         for reward in ("uniform", "linear", "hard")}
ROWS |= {f"group_{n}": f"{ROWS['own_high']} --group-size {n}" for n in (2, 4, 16)}
# The ablation of memories: SFT on walks to another room and back (houses of level 4).
MEMORIES = {
    "memory_lsm": "--memory lsm --memory-budget 8 --memory-recent 4",
    "memory_even": "--memory even --memory-budget 8",
    "memory_even_half": "--memory even --memory-budget 4",
    "memory_exponential": "--memory exponential --memory-budget 8",
    "memory_none": "--memory-budget 0",
}
# The ablation of actions per answer: SFT on the houses of the other rows.
HORIZONS = {f"horizon_{n}": n for n in (1, 3, 6, 8)}
# The transfer: to RxR's camera, longer sentences and more rooms, with a tenth of the walks.
TARGET = "evidence/target_ego/train"
TRANSFERS = {
    "transfer_sft": f"sft.py --data {TARGET} --lr 3e-4 --max-steps 400 {MEMORY} {LEARN} --model",
    "transfer_expert": f"grpo.py --data {TARGET} --lr 3e-4 --prompts 6400 {GRPO} --init",
    "transfer_own": f"grpo.py --data {{own}} --lr 3e-4 --prompts 6400 {GRPO} --init",
}
# GRPO in the simulator, from a policy whose prompts are dialogs (docs/activevln.md): plans compared
# at each state of a walk, or whole walks.
PLANS = ("-m activevln.grpo_online --groups state --batch-size 24 --group-size 8 --sims 24 "
         "--scale-rewards none --kl-coef 0.05 --schedule cosine --micro-tokens 6000 "
         "--max-steps 100 --val-every 50 --save-every 25")
ONLINE = {
    "online_state": f"{PLANS} --lr 3e-4 --temperature 0.7",
    "online_cool": f"{PLANS} --lr 1e-4 --temperature 0.4",
    "online_walks": f"{PLANS} --lr 1e-4 --temperature 0.7 --groups episode --batch-size 8 "
                    "--reward soft_success+0.5*progress",
}
# Rows that go on from another row's policy, with fresh walks of that policy: (that row, its flags).
# {first}: the walks of the SFT policy.
FURTHER = {"own2": ("own_high", ROWS["own_high"]), "own3": ("own2", ROWS["own_high"]),
           "dagger2": ("dagger", ROWS["dagger"].replace("{own}", "{first} {own}")),
           "dagger_own": ("dagger", ROWS["own_high"])}
# Rows that start from SFT with Muon instead of AdamW.
MUON = ("muon_own_high", "muon_dagger", "muon_sft")


class Job(NamedTuple):
    name: str
    needs: list[str]
    command: str


def own_walks(name: str, policy: str, needs: str, seed: int, walks: int = 1500,
              houses: str = "houses") -> Job:
    """Record greedy walks of a policy, labelled by the expert at every pose."""
    return Job(name, [needs], f"make_data.py --policy {policy} --episodes evidence/{houses} "
               f"--split train --limit {walks} --max-actions 60 --seed {seed} --device cpu "
               f"--sims 24 --out evidence/{name}")


def evaluation(run: str, ckpt: str, needs: str, houses: str = "unseen") -> Job:
    """The walks on which a checkpoint is evaluated: 1,200 in 300 houses, if they are `unseen`."""
    return Job(f"walk_{run}", [needs, houses], f"evaluate.py --ckpt {ckpt} --episodes "
               f"evidence/{houses} --split val_unseen --device cpu --dtype float32 --sims 24 "
               f"--max-actions 150 --out evidence/results/{run}")


def job_list(rows: list[str], sft_seeds: list[int], seeds: list[int]) -> list[Job]:
    """Every job, in the order in which they are wanted."""
    jobs = [Job("houses", [], "-m world.houses --out evidence/houses --train-houses 500 --jobs 1"),
            Job("unseen", [], "-m world.houses --out evidence/unseen --seed 1000 --train-houses 1 "
                "--unseen-houses 300 --val-episodes 1200 --jobs 1"),
            Job("record", ["houses"], "make_data.py --episodes evidence/houses --split train "
                "--noise 0.1 --out evidence/vln_ego")]
    makers = (dict.fromkeys(MEMORIES, memory_jobs) | dict.fromkeys(HORIZONS, horizon_jobs)
              | dict.fromkeys(TRANSFERS, transfer_jobs) | dict.fromkeys(ONLINE, online_jobs))
    for seed in seeds:
        for row in rows:
            for s in sft_seeds:
                jobs += makers.get(row, stage_two)(row, s, seed)
    return list({job.name: job for job in jobs}.values())


def sft_jobs(s: int, muon: bool = False) -> list[Job]:
    """An SFT policy with seed s, its own walks, and its evaluation; with Muon in fewer updates."""
    by, optimizer = ("muon_", " --optimizer muon") if muon else ("", "")
    steps = (2000, 800) if muon else (4500, 2000)
    look, sft = f"{by}look{s}", f"{by}sft{s}"
    return [Job(look, ["record"], f"sft.py --model tiny --data {EXPERT} --out "
                f"evidence/ckpt/{look} --memory-budget 0 --lr 2e-3 --max-steps {steps[0]} "
                f"--seed {s} {LEARN}{optimizer}"),
            Job(sft, [look], f"sft.py --model evidence/ckpt/{look} --data {EXPERT} --out "
                f"evidence/ckpt/{sft} {MEMORY} --lr 1e-3 --max-steps {steps[1]} --seed {s} {LEARN}"
                f"{optimizer}"),
            own_walks(f"{by}own{s}", f"evidence/ckpt/{sft}", sft, s),
            evaluation(f"muon_start_{s}_0" if muon else f"start_{s}", f"evidence/ckpt/{sft}", sft)]


def stage_two(row: str, s: int, seed: int) -> list[Job]:
    """Train one run of a row, from SFT policy s, and evaluate it; first the rows it goes on from.
    A job that is listed twice is run once."""
    run, ckpt = f"{row}_{s}_{seed}", f"evidence/ckpt/{row}_{s}_{seed}"
    jobs, start, own = sft_jobs(s), f"sft{s}", f"own{s}"
    if row.startswith("muon_"):
        jobs, start, own = sft_jobs(s, muon=True), f"muon_sft{s}", f"muon_own{s}"
        command = ROWS[row.removeprefix("muon_")]
    elif row in FURTHER:
        earlier, command = FURTHER[row]
        jobs, start, own = stage_two(earlier, s, seed), f"{earlier}_{s}_{seed}", f"walks_{run}"
        jobs.append(own_walks(own, f"evidence/ckpt/{start}", start, 100 + seed, walks=750))
    else:
        command = ROWS[row]
    flag = "--model" if command.startswith("sft.py") else "--init"
    command = command.format(own=f"evidence/{own}/train", first=f"evidence/own{s}/train")
    return [*jobs, Job(run, [own], f"{command} {flag} evidence/ckpt/{start} --out {ckpt} "
                       f"--seed {seed}"), evaluation(run, ckpt, run)]


def online_jobs(row: str, s: int, seed: int) -> list[Job]:
    """SFT on dialogs with seed s, then GRPO on this policy's walks in the simulator."""
    dialog, start, run = f"dialog{s}", f"online_start_{s}_0", f"{row}_{s}_{seed}"
    ckpt = f"evidence/ckpt/{run}"
    return [Job(dialog, ["record"], f"sft.py --model tiny --prompt dialog --vary-turns --data "
                f"{EXPERT} --out evidence/ckpt/{dialog} --optimizer muon --lr 2e-3 --batch-size 32 "
                f"--micro-tokens 6000 --max-steps 600 --seed {s} --save-every 200 {CPU}"),
            evaluation(start, f"evidence/ckpt/{dialog}", dialog),
            Job(run, [dialog], f"{ONLINE[row]} --init evidence/ckpt/{dialog} --episodes "
                f"evidence/houses --out {ckpt} --seed {seed} {CPU}"), evaluation(run, ckpt, run)]


def memory_jobs(row: str, s: int, _: int) -> list[Job]:
    """SFT with one memory and seed s, from one policy (of seed 0) that has learned these houses
    without a memory."""
    data, run = "evidence/vln_ego4/train", f"{row}_{s}_0"
    learn = f"--lr 1e-3 {LEARN} --optimizer muon --data {data}"
    return [
        Job("houses4", [], "-m world.houses --level 4 --out evidence/houses4 --seed 4000 "
            "--unseen-houses 150 --val-episodes 600 --jobs 1"),
        Job("record4", ["houses4"], "make_data.py --episodes evidence/houses4 --split train "
            "--noise 0.1 --waypoints reference --out evidence/vln_ego4"),
        sft_jobs(0, muon=True)[0],
        Job("look4", ["muon_look0", "record4"], "sft.py --model evidence/ckpt/muon_look0 "
            f"--out evidence/ckpt/look4 --memory-budget 0 --max-steps 1200 {learn}"),
        Job(run, ["look4"], f"sft.py --model evidence/ckpt/look4 --out evidence/ckpt/{run} "
            f"{MEMORIES[row]} --max-steps 1200 --seed {s} {learn}"),
        evaluation(run, f"evidence/ckpt/{run}", run, "houses4")]


def horizon_jobs(row: str, s: int, _: int) -> list[Job]:
    """SFT with that many actions per answer, of which at most three are carried out."""
    n, look, run = HORIZONS[row], f"evidence/ckpt/muon_look{s}", f"{row}_{s}_0"
    walk = evaluation(run, f"evidence/ckpt/{run}", run)
    return [
        Job("record8", ["houses"], "make_data.py --episodes evidence/houses --split train "
            "--noise 0.1 --horizon 8 --out evidence/vln_ego8"),
        sft_jobs(s, muon=True)[0],
        Job(run, [f"muon_look{s}", "record8"], f"sft.py --model {look} --data "
            f"evidence/vln_ego8/train --out evidence/ckpt/{run} {MEMORY} --horizon {n} --lr 1e-3 "
            f"--max-steps 300 --seed {s} {LEARN} --optimizer muon"),
        walk._replace(command=f"{walk.command} --execute {min(n, 3)}")]


def transfer_jobs(row: str, s: int, seed: int) -> list[Job]:
    """Adapt SFT policy s to the target, and evaluate it there, and where it came from (kept_..)."""
    run, start, own = f"{row}_{s}_{seed}", f"transfer_start_{s}_0", f"target_own{s}"
    kept = run.replace("transfer", "kept")

    def with_camera_of(data: str, name: str, ckpt: str, needs: list[str]) -> Job:
        """The same weights with the camera of a recording: sft.py takes it from the data."""
        return Job(name, needs, f"sft.py --model evidence/ckpt/{ckpt} --data {data} --out "
                   f"evidence/ckpt/{name} {MEMORY} {LEARN} --max-steps 1 --lr 1e-12")
    return [
        *sft_jobs(s),
        Job("target", [], "-m world.houses --level 2 --out evidence/target --seed 7000 "
            "--train-houses 50 --unseen-houses 150 --val-episodes 600 --jobs 1"),
        Job("target_record", ["target"], "make_data.py --episodes evidence/target --split train "
            "--noise 0.1 --hfov-deg 79 --camera-height-m 0.88 --out evidence/target_ego"),
        with_camera_of(TARGET, start, f"sft{s}", [f"sft{s}", "target_record"]),
        own_walks(own, f"evidence/ckpt/{start}", start, s, walks=750, houses="target"),
        evaluation(start, f"evidence/ckpt/{start}", start, "target"),
        Job(run, [own], f"{TRANSFERS[row]} evidence/ckpt/{start} --out evidence/ckpt/{run} "
            f"--seed {seed}".format(own=f"evidence/{own}/train")),
        evaluation(run, f"evidence/ckpt/{run}", run, "target"),
        with_camera_of(EXPERT, kept, run, [run]), evaluation(kept, f"evidence/ckpt/{kept}", kept)]


def keep_rows(run: str):
    """What docs/evidence/ keeps of a run's episodes; equal rows give equal bytes."""
    source = os.path.join(WORK, "results", run, "episodes.jsonl")
    with open(source) as file:
        rows = [json.loads(line) for line in file]
    text = "".join(json.dumps({key: row.get(key) for key in KEPT}) + "\n" for row in rows)
    os.makedirs(OUT, exist_ok=True)
    with open(os.path.join(OUT, f"{run}.jsonl.gz"), "wb") as file:
        file.write(gzip.compress(text.encode(), mtime=0))


def keep_minutes(found: dict[str, float | None]):
    """Add the CPU minutes of jobs to those in docs/evidence/. None: not measured."""
    path = os.path.join(OUT, "minutes.json")
    known = {}
    if os.path.exists(path):
        with open(path) as file:
            known = json.load(file)
    known |= {name: minutes for name, minutes in found.items() if minutes}
    with open(path, "w") as file:
        json.dump(dict(sorted(known.items())), file, indent=1)


class Lanes:
    """Run jobs in order, each as soon as what it needs is done, in `n` threads."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.lock = jobs, threading.Condition()
        self.path = os.path.join(WORK, "minutes.jsonl")
        self.minutes = {}
        if os.path.exists(self.path):
            with open(self.path) as file:
                self.minutes = {row["job"]: row for row in map(json.loads, file)}
        self.started = set(self.minutes)
        self.failed = set()

    def next_job(self) -> Job | None:
        """The first job that can be run now; waits for one. None: there is none any more."""
        with self.lock:
            while True:
                open_jobs = [job for job in self.jobs if job.name not in self.started]
                ready = [job for job in open_jobs if all(n in self.minutes for n in job.needs)]
                if ready:
                    self.started.add(ready[0].name)
                    return ready[0]
                if not self.started - set(self.minutes) - self.failed:
                    return None                   # nothing is running that could make one ready
                self.lock.wait()

    def run(self):
        while job := self.next_job():
            status, minutes = self.execute(job)
            with self.lock:
                if status:
                    self.failed.add(job.name)
                    print(f"{job.name}: status {status}, see evidence/logs/{job.name}.log")
                else:
                    self.minutes[job.name] = minutes
                    with open(self.path, "a") as file:
                        file.write(json.dumps(minutes) + "\n")
                    print(f"{job.name}: {minutes['cpu_minutes']} CPU minutes", flush=True)
                self.lock.notify_all()

    def execute(self, job: Job) -> tuple[int, dict]:
        """CPU minutes are those of the process and its children: another load does not count.
        None for a job that goes on after an interruption, whose first part was not measured."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        begin, path = time.monotonic(), os.path.join(WORK, "logs", f"{job.name}.log")
        resumed = os.path.exists(path)
        with open(path, "a") as log:
            process = subprocess.Popen([sys.executable, *job.command.split()], cwd=ROOT, env=env,
                                       stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if not status and job.name.startswith("walk_"):
            keep_rows(job.name.removeprefix("walk_"))
        cpu = None if resumed else round((usage.ru_utime + usage.ru_stime) / 60, 2)
        return status, {"job": job.name, "minutes": round((time.monotonic() - begin) / 60, 2),
                        "cpu_minutes": cpu}


def main(args):
    jobs = [job._replace(command=job.command.replace("--device cpu", f"--device {args.device}"))
            for job in job_list(args.rows, args.sft_seeds, args.seeds)]
    os.makedirs(os.path.join(WORK, "logs"), exist_ok=True)
    lanes = Lanes(jobs)
    if args.list:
        for job in jobs:
            print(f"{'done' if job.name in lanes.minutes else '    '} {job.name}: {job.command}")
        return
    threads = [threading.Thread(target=lanes.run) for _ in range(args.lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keep_minutes({name: row["cpu_minutes"] for name, row in lanes.minutes.items()})
    sys.exit(bool(lanes.failed))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Run the study of stage two.")
    every = [*ROWS, *FURTHER, *MUON, *ONLINE, *MEMORIES, *HORIZONS, *TRANSFERS]
    p.add_argument("--rows", nargs="+", choices=every, default=every)
    p.add_argument("--sft-seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of stage two")
    p.add_argument("--lanes", type=int, default=2)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--list", action="store_true")
    main(p.parse_args())
