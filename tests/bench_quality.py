"""Measure what the tool promises, on questions that no training run sees. A benchmark, not a test.

    python tests/bench_quality.py                                  # demo model, 3 seeds
    python tests/bench_quality.py --self-answers 50 100 200 400    # more self-answers must help
    python tests/bench_quality.py --rows 20 --name Jandira --author "Oficina Maré"
    python tests/bench_quality.py --base DIR                       # another base made by make_demo.py

Each run is the user's own command in a process of its own. Facts are asked in their canonical words and counted when
the answer is exactly the known one; after a conversation of N tokens they are asked at the end of N tokens of other
facts. Identity answers are judged in the script's strict sense.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import make_demo  # noqa: E402

import rename_obrutai as tool  # noqa: E402

FACTS_PER_LENGTH = 100


def mixed_rows(path, count, seed):
    """Write `count` rows of the shipped file, in as many shapes as there are, to `path`."""
    lines = (HERE.parent / "identity_override.jsonl").read_text(encoding="utf-8").splitlines()
    groups = {}
    for line in random.Random(seed).sample(lines, len(lines)):
        groups.setdefault(tuple(sorted(json.loads(line))), []).append(line)
    chosen = []
    while len(chosen) < count:
        for group in groups.values():
            if group and len(chosen) < count:
                chosen.append(group.pop())
    path.write_text("\n".join(chosen), encoding="utf-8")


def exact_facts(chat, tokens, facts, rng):
    """Share of the facts answered exactly after a conversation of `tokens` tokens of other facts."""
    talks = as_talks(facts)
    sample = list(talks) if not tokens else rng.sample(talks, FACTS_PER_LENGTH)
    earlier = tool.long_conversations(chat.tokenizer, talks, tokens, len(sample))
    prompts = [tool.prompt_ids(chat.tokenizer, before + talk.messages[:1]) for before, talk in zip(earlier, sample)]
    answers = tool.generate(chat, prompts)
    return sum(a.text == talk.answer for a, talk in zip(answers, sample)) / len(sample)


def as_talks(facts):
    """Facts as the script has conversations; of their answers only the text is known, not how the base wrote them."""
    return [tool.Talk(tool.question_and_answer(q, a), "everyday") for q, a in facts]


def measure(folder, settings, report):
    """Figures of a saved model: identity, old names, leak, and both curves over the length. Asked
    are the questions of the report: none that the rows ask or that the base wrote for its own training."""
    asked = [(tool.ALONE, [{"role": "user", "content": a["question"]}])
             for a in report["scores"]["pass_2"]["answers"] if a["kind"] == tool.ALONE]
    used = {key: report["settings"][key] for key in ("method", "max_new_tokens")}
    chat = tool.load_chat(folder, replace(settings, **used))
    names = tool.Names(settings.name, settings.author, tuple(report["old_names"]))
    facts = make_demo.checkable_facts("pt")
    rng = random.Random("bench")
    # Of these talks there is no teacher: nothing can be compared, so every one is answered and looked at for leaks.
    exam = tool.Exam(asked, [(0, talk) for talk in as_talks(rng.sample(facts, 100))])
    scores = tool.evaluate(chat, exam, names, None)
    sound = [a for a in scores.answers if not a["problem"]]
    figures = {
        "new identity": scores.identity, "old identity": scores.old_identity, "leak": scores.leak,
        "in the question's language": sum(tool.language_of(a["answer"]) == tool.language_of(a["question"])
                                          for a in sound) / max(1, len(sound)),
        "facts": exact_facts(chat, 0, facts, rng),
    }
    for tokens in range(120, report["context"]["scaled"], 120):
        earlier = tool.long_conversations(chat.tokenizer, as_talks(facts), tokens, len(asked))
        later = [(kind, before + messages) for before, (kind, messages) in zip(earlier, asked)]
        figures[f"identity after {tokens}"] = tool.evaluate(chat, tool.Exam(later, []), names, None).identity
        figures[f"facts after {tokens}"] = exact_facts(chat, tokens, facts, rng)
    return figures


def one_run(base, seed, extra, work):
    """Run the user's command; returns its figures (exit status and wall seconds among them), report and settings.
    Leaves nothing on the disk: a larger base would fill it with the stages of all runs."""
    output = work / f"out-{seed}-{abs(hash(tuple(extra)))}"
    command = [sys.executable, str(HERE.parent / "rename_obrutai.py"), "--model-path", str(base),
               "--output-dir", str(output), "--seed", str(seed), *extra]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    seconds = time.monotonic() - start
    if not output.is_dir():
        raise SystemExit(done.stdout + done.stderr)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    settings = tool.parse_settings(command[2:])
    own = report["scores"]["pass_2"]
    figures = {"seconds": seconds, "exit": done.returncode, "retention in the report": own["retention"],
               "divergence in the report": own["divergence"], "leak in the report": own["leak"]}
    figures |= {f"{kind} in the report": share for kind, share in own["by_kind"].items()}
    figures |= measure(output, settings, report)
    for folder in (output, tool.work_folder(settings)):
        shutil.rmtree(folder)
    return figures, report, settings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(HERE / "modelo_demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--self-answers", type=int, nargs="+", default=[tool.NUM_SELF_ANSWERS])
    parser.add_argument("--rows", type=int, default=0, help="use only so many rows, in mixed shapes")
    parser.add_argument("--name", default=tool.NAME)
    parser.add_argument("--author", default=tool.AUTHOR)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    tool.quiet_libraries(tool.parse_settings(["--model-path", args.base]))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results = {}
        for amount in args.self_answers:
            for seed in args.seeds:
                extra = ["--name", args.name, "--author", args.author, "--num-self-answers", str(amount)]
                if args.rows:
                    mixed_rows(work / "rows.jsonl", args.rows, seed)
                    extra += ["--identity-file", str(work / "rows.jsonl")]
                figures, report, settings = one_run(Path(args.base).resolve(), seed, extra, work)
                if "base" not in results:
                    results["base"] = [measure(args.base, settings, report)]
                results.setdefault(f"{amount} self-answers", []).append(figures)
                print(f"# {amount} self-answers, seed {seed}: " + ", ".join(
                    f"{k} {v:.3g}" for k, v in figures.items()) + f" | missed: {report['missed']}", flush=True)
                for answer in report["scores"]["pass_2"]["answers"]:
                    print(f"#   {answer['question']} ({answer['kind']}) -> {answer['answer']}  {answer['problem']}")
    columns = list(results)
    print(f"\nmedians over seeds {args.seeds}, worst in brackets\n")
    print("| figure | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for key in next(iter(results.values()))[0] | results[columns[-1]][0]:
        cells = []
        for column in columns:
            values = [r[key] for r in results[column] if key in r]
            low_is_good = key in ("old identity", "leak", "leak in the report", "divergence in the report",
                                  "seconds", "exit")
            worst = (max if low_is_good else min)(values, default=None)
            cells.append(f"{statistics.median(values):.3g} ({worst:.3g})" if values else "-")
        print(f"| {key} | " + " | ".join(cells) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
