"""Measure how fast the tool is beside what it replaces, plain TRL, and what the machine can do. Not a test.

    python tests/bench_speed.py             # three sizes of model, three rounds: a good quarter of an hour
    python tests/bench_speed.py --quick     # the demo model, one round, without the whole run of the demo
    python tests/bench_speed.py --gpu       # on a graphics card with 140 GB: models shaped like Llama 3 1B and 8B

All do the same job: EPOCHS[0] times over the identity rows, one answer of NEW_TOKENS tokens to each of 50, 100 or 400
questions, EPOCHS[1] times over the rows and as many answers (the same for all: facts of the demo). Without --gpu all
is done on the processor. Each procedure runs in a process of its own, in turns:

  replaced   whole rows padded to 1024 tokens, batch 2, eager attention, answers one at a time
  trl        SFTTrainer as it comes (on a processor it asks for use_cpu and then computes in bfloat16), answers one at
             a time; "trl fp32" is the same in float32 (not on a card); LoRA where the tool uses it
  tool       this tool's own functions; its self-text, healing and exams are in the whole run of the demo, not here
  limit      the tool's tokens as bare products, 6 x parameters x tokens (4 x for weights that LoRA leaves alone), at
             the rate that products of the model's shapes reach in the tool's precision; for answers 2 x, or all
             weights read once per step

Of long passes CAPS steps are measured, and the rest counted at their mean ("~"). Peak memory is above that of the
imported libraries, for the limit that of weights, gradients and optimizer; on a card it is what PyTorch allocated.
The card's models are in bfloat16, and trained by the first two as they are. Linux and macOS.
"""

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import make_demo  # noqa: E402

import rename_obrutai as tool  # noqa: E402

SIZES = {"demo": None, "10 M": (320, 7), "50 M": (640, 9), "1 B": (2048, 16), "8 B": (4096, 32)}  # width, layers
GPU_SIZES = ["1 B", "8 B"]
GPU_SHAPE = {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16", "max_position_embeddings": 8192}
MLP = {2048: 8192, 4096: 14336}  # width of the MLP, where it is not three times the hidden size
METHOD = {"8 B": "lora"}  # all others: full
AMOUNTS = ("50", "100", "400")  # self-answers
STAGES = ("pass 1", "answers", "pass 2")
EPOCHS = (4, 3)  # of the two passes: one round of each in the tool; ten times as many on a card, whose steps are large
NEW_TOKENS, NEVER = 24, 10**6  # tokens of an answer; a token that nothing writes, so that none ends earlier
# Steps of a pass, and answers one at a time, that are measured; 0 is all of them.
CAPS = {"demo": {"replaced": 6, "trl": 0, "trl fp32": 0, "tool": 0, "answers": 20},
        "10 M": {"replaced": 4, "trl": 16, "trl fp32": 16, "tool": 12, "answers": 12},
        "50 M": {"replaced": 3, "trl": 9, "trl fp32": 9, "tool": 6, "answers": 8},
        "1 B": {"replaced": 10, "trl": 16, "tool": 10, "answers": 6},
        "8 B": {"replaced": 8, "trl": 10, "tool": 8, "answers": 4}}


def now():
    """The time when all that was begun is done: a card works on its own."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Meter:
    """What happens in a stage: when each step (or single answer) ended, tokens that the model saw, its precision."""
    ends: list

    def tick(self, *_):
        self.ends.append(now())

    def watch(self, model):
        """Count what goes through the model from now on."""
        import torch

        def see(module, args, given):
            ids, mask = given["input_ids"], given.get("attention_mask")
            self.calls += 1
            self.processed += ids.numel()
            self.real += int((ids != 0).sum() if mask is None else mask[:, -ids.shape[1]:].sum())  # 0 is <pad>

        model = tool.whole(model)  # what LoRA wraps around a model calls it past its hooks
        model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
        next(m for m in model.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
            lambda module, args, output: setattr(self, "dtype", output.dtype))

    def stage(self, work):
        """Do a stage; its figures, brought to the whole of it. `work` returns the steps that the whole has."""
        self.ends, self.real, self.processed, self.calls, began = [], 0, 0, 0, now()
        whole = work()
        seconds, done = now() - began, len(self.ends)
        each = (self.ends[-1] - self.ends[0]) / (done - 1) if done > 1 else 0.0  # the first one warms up
        return {"seconds": seconds + (whole - done) * each, "each": each, "steps": whole, "measured": done} | {
            key: getattr(self, key) * (whole / done if done else 1) for key in ("real", "processed", "calls")}


# ---- The procedures ---------------------------------------------------------------------------------------

class Replaced:
    """The procedure that this tool replaces."""
    attention = "eager"

    def __init__(self, folder, work, meter, cap, answers, method):
        import torch
        from transformers import AutoModelForCausalLM

        self.work, self.meter, self.cap, self.answers, self.method = work, meter, cap, answers, method
        self.tokenizer, self.gpu = tool.load_tokenizer(folder), torch.cuda.is_available()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if self.gpu else torch.float32,
            attn_implementation=self.attention).to("cuda" if self.gpu else "cpu")
        meter.watch(self.model)

    def train(self, number, conversations):
        """A pass; how many steps the whole of it has."""
        import torch

        texts = [self.tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
        inputs = self.tokenizer(texts, padding="max_length", max_length=1024, truncation=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        order = [i for _ in range(EPOCHS[number]) for i in random.sample(range(len(texts)), len(texts))]
        batches = [order[i:i + 2] for i in range(0, len(order), 2)]
        self.model.train()
        for batch in batches[:self.cap]:
            rows = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
            self.model(**{key: rows[key][batch].to(self.model.device) for key in rows}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return len(batches)

    def answer(self, questions):
        """Answers to some questions; to how many there should be answers."""
        self.model.eval()
        for question in questions[:self.answers]:
            inputs = self.tokenizer.apply_chat_template([{"role": "user", "content": question}], return_dict=True,
                                                        add_generation_prompt=True,
                                                        return_tensors="pt").to(self.model.device)
            written = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=NEVER,
                                          use_cache=True)
            self.tokenizer.decode(written[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
            self.meter.tick()
        return len(questions)


class PlainTRL(Replaced):
    """SFTTrainer with its defaults."""
    attention, options = "sdpa", {}

    def train(self, number, conversations):
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        steps = EPOCHS[number] * math.ceil(len(conversations) / 8)
        arguments = SFTConfig(output_dir=str(self.work / "trl"), num_train_epochs=EPOCHS[number],
                              use_cpu=not self.gpu, max_steps=min(self.cap or steps, steps), report_to="none",
                              save_strategy="no" if self.gpu else "steps", disable_tqdm=True, **self.options)
        fresh = self.method == "lora" and not number  # the second pass goes on with the adapter of the first
        trainer = SFTTrainer(self.model, args=arguments, processing_class=self.tokenizer,
                             peft_config=LoraConfig(task_type="CAUSAL_LM") if fresh else None,
                             train_dataset=Dataset.from_dict({"messages": conversations}))
        trainer.train()
        self.model = trainer.model
        self.model.gradient_checkpointing_disable()  # for the answers
        return steps


class FloatTRL(PlainTRL):
    """The same without bfloat16, which few processors have."""
    options = {"bf16": False}


class Tool:
    """This tool: each stage loads what the one before saved, as in a run."""

    def __init__(self, folder, work, meter, cap, answers, method):
        settings = tool.parse_settings(["--model-path", folder, "--output-dir", str(work / "out"), "--method", method])
        settings, self.native = tool.fit_settings(Path(folder), settings)
        self.settings, _ = tool.choose_method(tool.read_config(folder), tool.check_base(Path(folder)), settings)
        self.source, self.work, self.meter, self.cap = folder, work, meter, cap

    def load(self, **how):
        import torch

        chat = tool.load_chat(self.source, self.settings, **how)
        self.meter.watch(chat.model)
        self.sizes = {"parameters": chat.model.num_parameters(),
                      "trained": chat.model.num_parameters(only_trainable=True)}
        self.shapes = Counter((m.in_features, m.out_features) for m in chat.model.modules()
                              if isinstance(m, torch.nn.Linear))
        return chat

    def train(self, number, conversations):
        chat, window, folder = self.load(adapt=not number), self.settings.window, Path(tempfile.mkdtemp(dir=self.work))
        lengths = [window // 8, window // 4, window // 2, window] if number else [
            tool.short_window(self.native, self.settings)]
        nothing, pool = tool.Teacher(None, None, {}, {}), tool.Pool(conversations, 1.0, True)
        batches = tool.make_batches(chat.tokenizer, nothing, [pool], lengths, math.inf, tool.step_tokens(
            self.native, self.settings), "bench", EPOCHS[number] * len(conversations))
        shown = batches
        if self.cap and self.cap < len(batches):  # of each length its share
            order = sorted(batches, key=lambda batch: len(batch[0]["input_ids"]))
            shown = [order[int((i + 0.5) * len(order) / self.cap)] for i in range(self.cap)]
        log = tool.train(chat, shown, nothing, 1e-5, 0.0, self.settings, "pass", folder / "training")
        tool.save_stage(chat, folder, log)
        self.source = folder
        return len(batches)

    def answer(self, questions):
        tool.ask(self.load()._replace(stops=[NEVER], max_new_tokens=NEW_TOKENS), questions)
        return 0  # measured whole


PROCEDURES = {"replaced": Replaced, "trl": PlainTRL, "trl fp32": FloatTRL, "tool": Tool}


# ---- In a process of its own ------------------------------------------------------------------------------

def limits(shapes, rows, dtype):
    """Operations a second in the three products of each of a model's matrices (how many of each shape), `rows` tokens
    at a time: of one matrix again and again, and of one after the other, as a model goes through them; in large square
    ones; bytes a second read from memory. The best of several tries: others may use the machine."""
    import torch

    def best(work, *args, **options):
        times = [now()]
        for _ in range(20):
            work(*args, **options)
            times.append(now())
        return min(after - before for before, after in zip(times, times[1:]))

    def one_after_another(x, y, weights):
        for weight in weights:
            for a, b in ((x, weight.T), (y, weight), (y.T, x)):
                torch.mm(a, b)

    operations, seconds, cold, device = 0, 0, 0, "cuda" if torch.cuda.is_available() else "cpu"
    for (inputs, outputs), number in shapes.items():
        x, weight, y = (torch.randn(shape, dtype=dtype, device=device)
                        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        for a, b, like in ((x, weight.T, y), (y, weight, x), (y.T, x, weight)):
            seconds += number * best(torch.mm, a, b, out=torch.empty_like(like))
            operations += number * 2 * rows * inputs * outputs
        weights = torch.randn((number, *weight.shape), dtype=dtype, device=device)
        cold += best(one_after_another, x, y, weights)
        del weights
    side = 8192 if device == "cuda" else 1024
    square = torch.randn((side, side), dtype=dtype, device=device)
    return {"rate": operations / seconds, "cold": operations / cold,
            "square": 2 * side**3 / best(torch.mm, square, square),
            "bandwidth": 2**30 / best(torch.ones(2**28, device=device).sum)}


def measure(name, size, folder, quick):
    """Figures of one procedure on one model."""
    import resource

    import psutil
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from trl import SFTTrainer  # noqa: F401

    global EPOCHS
    process, meter, first, tool.say.quiet = psutil.Process(), Meter(), [], True
    if name == "tool":  # as a run begins: how memory is allocated, and no looking for garbage among the libraries
        tool.quiet_libraries(tool.parse_settings([]))
        gc.freeze()
    gpu, method = torch.cuda.is_available(), METHOD.get(size, "full")
    EPOCHS = (40, 30) if gpu else EPOCHS
    torch.ones(8, 8, requires_grad=True, device="cuda" if gpu else "cpu").sum().backward()
    imported, before = time.time() - process.create_time(), process.memory_info().rss
    register_optimizer_step_post_hook(meter.tick)
    register_optimizer_step_post_hook(lambda *_: first or first.append(time.time() - process.create_time()))
    inputs, tokenizer = tool.check_inputs(tool.parse_settings(["--model-path", folder])), tool.load_tokenizer(folder)
    rows = [tool.without_system(tokenizer, row.messages) for row in inputs.rows]
    turns = [tool.Turn(*fact) for fact in random.Random(0).sample(make_demo.checkable_facts("pt"), int(AMOUNTS[-1]))]
    cap = CAPS[size][name] or (30 if quick else None)
    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        job = PROCEDURES[name](folder, Path(work), meter, cap, CAPS[size]["answers"], method)
        loading = time.perf_counter() - began
        learnt = meter.stage(partial(job.train, 0, rows))
        learnt["seconds"] += loading
        answers = {n: meter.stage(partial(job.answer, [t.question for t in turns[:int(n)]])) for n in AMOUNTS}
        firm = {n: meter.stage(partial(job.train, 1, rows + [t.messages() for t in turns[:int(n)]]))
                for n in ([AMOUNTS[1]] if cap else AMOUNTS)}
        known = firm[AMOUNTS[1]]
        for n in AMOUNTS if cap else ():  # steps like the measured ones, more or fewer of them
            share = (len(rows) + int(n)) / (len(rows) + int(AMOUNTS[1]))
            firm[n] = {key: value * share if key in ("steps", "real", "processed", "calls") else value
                       for key, value in known.items()}
            firm[n]["seconds"] += known["each"] * known["steps"] * (share - 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) - before
        peak = torch.cuda.max_memory_allocated() if gpu else peak
        jobs = {n: dict(zip(STAGES, (learnt, answers[n], firm[n]))) for n in AMOUNTS}
        for stages in jobs.values():
            stages["seconds"] = sum(stage["seconds"] for stage in stages.values())
        figures = {"imports": imported, "first step": first[0], "peak": peak, "threads": torch.get_num_threads(),
                   "jobs": jobs}
        if name == "tool":
            parts = job.settings.gradient_accumulation if gpu else 1
            tokens = tool.step_tokens(job.native, job.settings) // parts
            shown = ("method", "window", "gradient_accumulation", "gradient_checkpointing")
            figures |= job.sizes | limits(job.shapes, tokens, meter.dtype) | {
                "dtype": str(meter.dtype), "settings": {key: getattr(job.settings, key) for key in shown}}
    return figures


def whole_run(folder):
    """The tool as the user calls it, saying when its first training step is done; its exit status."""
    train = tool.train

    def announced(*args):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        seen = []
        register_optimizer_step_post_hook(lambda *_: seen or seen.append(print("[first step]", flush=True)))
        tool.train = train
        return train(*args)

    tool.train = announced
    return tool.main(["--output-dir", folder])


# ---- All of them ------------------------------------------------------------------------------------------

def in_a_process(*words):
    """Figures of one measurement, made by this script in a new process."""
    done = subprocess.run([sys.executable, __file__, "--measure", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_the_demo(output):
    """The demo with nothing edited: seconds to the first line, the first training step and the end, and by stage."""
    began, lines = time.perf_counter(), {}
    with subprocess.Popen([sys.executable, __file__, "--whole", str(output)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            lines.setdefault(line.strip(), time.perf_counter() - began)
    if not (output / "report.json").is_file():
        raise SystemExit("\n".join(lines))
    return {"whole": time.perf_counter() - began, "first line": min(lines.values()),
            "first step": lines["[first step]"], "stages": tool.load_json(output / "report.json")["seconds"]}


def build(folder, hidden, layers):
    """A random Llama model with the demo's tokenizer and context, or with the shapes of Llama 3."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, large = tool.load_tokenizer(str(HERE / "modelo_demo")), hidden in MLP
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": make_demo.CONTEXT} | (GPU_SHAPE if large else {})
    with torch.device("cuda" if large else "cpu"):
        torch.set_default_dtype(torch.bfloat16 if large else torch.float32)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=hidden, intermediate_size=MLP.get(hidden, 3 * hidden), num_hidden_layers=layers,
            num_attention_heads=32 if large else hidden // 64, tie_word_embeddings=hidden < 4096, **shape))
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if large:
        torch.cuda.empty_cache()


def limit(own):
    """The tool's tokens of one round at the rates that its own process measured, as if it were a procedure."""
    jobs, each = {}, own["parameters"] / own["rate"]
    step = (4 * own["parameters"] + 2 * own["trained"]) / own["rate"]
    for n, job in own["jobs"].items():
        asked = job["answers"]
        weights = own["parameters"] * (2 if "16" in own["dtype"] else 4)
        seconds = (step * job["pass 1"]["real"],
                   max(2 * each * asked["real"], weights * asked["calls"] / own["bandwidth"]),
                   step * job["pass 2"]["real"])
        jobs[n] = {stage: {**job[stage], "seconds": s, "measured": job[stage]["steps"],
                           "processed": job[stage]["real"]} for stage, s in zip(STAGES, seconds)}
        jobs[n]["seconds"] = sum(seconds)
    frozen = own["parameters"] - own["trained"]
    return {"jobs": jobs, "peak": 16 * own["trained"] + frozen * (2 if "16" in own["dtype"] else 4)}


def training(job):
    return job["pass 1"]["seconds"] + job["pass 2"]["seconds"]


def steps(job):
    """Seconds of the steps of both passes, without loading before and saving after."""
    return sum(job[stage]["each"] * job[stage]["steps"] for stage in ("pass 1", "pass 2"))


def padding(job):
    return 1 - sum(job[stage]["real"] for stage in STAGES) / sum(job[stage]["processed"] for stage in STAGES)


def table(runs, n):
    """Print one amount of work at one size: medians of the rounds, and of the ratios within each round."""
    print("".join(f"{title:>10s}" for title in (f"{n} answ.", *STAGES, "job", "tok/s", "padding", "peak MB",
                                               *("/" + name for name in runs[0]))))
    for name in runs[0]:
        jobs = [run[name]["jobs"][n] for run in runs]
        cells = [name]
        for stage in STAGES:
            guessed = jobs[0][stage]["measured"] != jobs[0][stage]["steps"]
            cells.append("~" * guessed + f"{median(job[stage]['seconds'] for job in jobs):.3g}")
        speed = median((job["pass 1"]["real"] + job["pass 2"]["real"]) / training(job) for job in jobs)
        cells += [f"{median(job['seconds'] for job in jobs):.3g}", f"{speed:.0f}",
                  f"{median(map(padding, jobs)):.1%}", f"{median(run[name]['peak'] for run in runs) / 1e6:.0f}"]
        for other in runs[0]:
            cells.append(f"{median(j['seconds'] / r[other]['jobs'][n]['seconds'] for j, r in zip(jobs, runs)):.2f}")
        print("".join(f"{cell:>10s}" for cell in cells))


def targets(results, demo):
    """(what, figure, target, whether more is better); against several others, or amounts, the least favourable."""
    def seconds(run, name, n, stages=()):
        job = run[name]["jobs"][n]
        return sum(job[stage]["seconds"] for stage in stages or STAGES)

    def faster(others, stages=(), amounts=("100",)):
        return lambda run: min(seconds(run, other, n, stages) / seconds(run, "tool", n, stages)
                               for other in others for n in amounts)

    def growth(*stages):
        return lambda run: seconds(run, "tool", "400", stages) / seconds(run, "tool", "100", stages)

    singly = [name for name in next(iter(results.values()))[0] if name not in ("tool", "limit")]
    by_size = [("job, times faster than the replaced procedure", faster(["replaced"], (), AMOUNTS), 10, True),
               ("job, times faster than plain TRL", faster(singly[1:], (), AMOUNTS), 2, True),
               ("padding among processed tokens", lambda run: padding(run["tool"]["jobs"]["100"]), 0.1, False),
               ("job with 400 answers / with 100", growth(), 4.4, False),
               ("writing 400 answers / 100", growth("answers"), 4.4, False),
               ("first training step of the job, imports included, s", lambda run: run["tool"]["first step"], 15,
                False)]
    large = [("training, share of the limit's speed", faster(["limit"], ("pass 1", "pass 2")), 0.6, True),
             ("answers, times faster than one at a time", faster(singly, ("answers",)), 8, True),
             ("peak / (weights, gradients, optimizer)", lambda run: run["tool"]["peak"] / run["limit"]["peak"], 1.5,
              False)]
    found = [(f"{size}: {what}", median(map(figure, runs)), *rest) for size, runs in results.items()
             for what, figure, *rest in by_size + large * (size == "50 M")]
    return found + [(f"whole run of the demo, once: {what}, s", demo[what], target, False)
                    for what, target in (("whole", 90), ("first line", 1), ("first step", 15)) * bool(demo)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo model, one round, no whole run of the demo")
    parser.add_argument("--gpu", action="store_true", help="on the graphics card, one round, no whole run of the demo")
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--rounds", type=int, help="three, or one with --quick or --gpu")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "bench_speed.json")
    args = parser.parse_args()
    usual = ["demo"] if args.quick else GPU_SIZES if args.gpu else [size for size in SIZES if size not in GPU_SIZES]
    sizes, rounds = args.sizes or usual, args.rounds or (1 if args.quick or args.gpu else 3)
    procedures = [name for name in PROCEDURES if not (args.gpu and name == "trl fp32")]
    tool.quiet_libraries(tool.parse_settings([]))
    if not args.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    began, results, demo = time.monotonic(), {size: [{} for _ in range(rounds)] for size in sizes}, None
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for size in sizes:
                model, run = Path(folder) / size if SIZES[size] else HERE / "modelo_demo", results[size][number]
                if not model.exists():
                    build(model, *SIZES[size])
                for name in procedures:
                    run[name] = in_a_process(name, size, str(model), "quick" * args.quick)
                    print(f"round {number + 1}, {size}, {name}: {run[name]['jobs']['100']['seconds']:.1f} s with 100 "
                          f"answers; {time.monotonic() - began:.0f} s since the start", flush=True)
                run["limit"] = limit(run["tool"])
        if not (args.quick or args.gpu):
            demo = run_the_demo(Path(folder) / "renamed")
    print("\nSeconds (~ extrapolated), real tokens a second in training, and how many times as long as each other")
    for size in sizes:
        run, own = results[size][-1], results[size][-1]["tool"]
        print(f"\n{size}: {own['parameters'] / 1e6:.1f} M parameters, {own['threads']} threads, {own['dtype']}; "
              f"products {own['rate'] / 1e9:.0f} GFLOP/s, memory\n{own['bandwidth'] / 1e9:.1f} GB/s; imports "
              f"{own['imports']:.1f} s; measured steps of pass 2 with 100 answers: " + ", ".join(
                  "{} {measured}/{steps}".format(name, **run[name]["jobs"]["100"]["pass 2"]) for name in procedures))
        shares = [median(training(r["limit"]["jobs"]["100"]) / work(r["tool"]["jobs"]["100"]) for r in results[size])
                  for work in (training, steps)]
        rate, cold, square = (own[key] / 1e9 for key in ("rate", "cold", "square"))
        print(f"tool: {own['settings']}; training at {shares[0]:.0%} of the limit, its steps alone\n"
              f"at {shares[1]:.0%}. GFLOP/s of products: as the limit has it {rate:.0f}, one matrix after the other\n"
              f"{cold:.0f} (of which the steps reach {shares[1] * rate / cold:.0%}), large square ones {square:.0f}")
        for n in AMOUNTS:
            table(results[size], n)
    if demo:
        print("\nwhole run of the demo, seconds by stage:", demo["stages"])
    found = targets(results, demo)
    print()
    for what, figure, target, more in found:
        verdict = "reached" if (figure >= target if more else figure <= target) else "MISSED"
        print(f"{verdict:8s} {what}: {figure:.3g} (at {'least' if more else 'most'} {target})")
    args.output.write_text(json.dumps({"rounds": results, "demo": demo, "targets": found}, indent=1), encoding="utf-8")
    print(f"\nfigures in {args.output}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4], bool(sys.argv[5]))))
    elif sys.argv[1:2] == ["--whole"]:
        sys.exit(whole_run(sys.argv[2]))
    else:
        main()
