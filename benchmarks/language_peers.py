"""Alignment beside TRL: the same model, prompts, rewards and work, whole iterations.

    pip install -c constraints.txt -e ".[peers,rlhf]"
    python benchmarks/language_peers.py [--only small smollm2-chat] [--model smollm2] [--rounds 5] [--seconds 20]
    python benchmarks/language_peers.py --docs

Each contender is a process of its own with one torch thread, warmed up by one iteration.  In every round each has its
turn, in one order and then in the other, while the other waits; in its turn it finishes iterations until so much of its
own CPU time is over.  The two libraries are compared one method at a time.  Written down are iterations per CPU second,
the mean reward of each iteration with the CPU time until then, and the peak of resident memory.  Raw results lie in
benchmarks/results/language_peers.

Both sample at temperature 1, in float32, and make ``epochs`` Adam steps (eps 1e-8, no decay) on all responses of an
iteration, clipped to a norm of 1.  RLOO takes the KL from the reward (k1), GRPO k3 in the loss, a mean over tokens.
``small`` is a Llama with random weights that is made on the spot; its reward is the share of words with a number below
300.  ``smollm2`` is the directory of --model, its reward the sentiment by vaderSentiment.  In ``smollm2-chat`` prompts
are in its chat template, which makes them longer.  Means of fewer than five rewards are not shown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, keep, source, write_table

from pgsuite import seeding
from pgsuite.algorithms import PPO, Reinforce
from pgsuite.algorithms.estimators import GRPO, RLOO
from pgsuite.algorithms.reference import Reference
from pgsuite.nn.policy import Critic
from pgsuite.rlhf import corpus
from pgsuite.rlhf.env import LanguageEnv, PretrainedTokens
from pgsuite.rlhf.generation import GenerationCollector
from pgsuite.rlhf.policy import language_policy, load

KEPT = RESULTS / "language_peers"
PEERS = ("trl", "transformers", "accelerate")
OPTIM = {"_target_": "adam", "eps": 1e-8}


@dataclass
class Case:
    responses: int
    group: int
    length: int
    epochs: int  # of GRPO; RLOO makes one step
    lr: float
    coef: float
    words: str
    chat: bool = False


CASES = {
    "small": Case(64, 4, 24, 2, 1e-3, 0.05, "Llama, 4 layers of 128, vocabulary of 3,000"),
    "smollm2": Case(16, 4, 24, 2, 1e-5, 0.05, "SmolLM2-135M-Instruct, beginnings of sentences"),
    "smollm2-chat": Case(16, 4, 24, 2, 1e-5, 0.05, "SmolLM2-135M-Instruct, chat template", chat=True),
}
FEWEST = 5  # iterations of which a mean reward is shown
METHODS, LIBRARIES = ("rloo", "grpo"), ("pgsuite", "trl")


def prompts(case: str) -> list[str]:
    if case != "small":
        return sorted(set(corpus.prompts()))
    draw = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(2_999, (int(n),), generator=draw).tolist() for n in torch.randint(3, 13, (256,), generator=draw)
    ]
    return [" ".join(f"w{i}" for i in row) for row in rows]


class Reward:
    """Rewards of responses [N], which notes their mean and the CPU time until then."""

    __name__ = "reward"

    def __init__(self, case: str) -> None:
        self.means: list[tuple[float, float]] = []
        if case != "small":
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore

            analyzer = SentimentIntensityAnalyzer()
            self.score = lambda text: analyzer.polarity_scores(text)["compound"]
        else:
            self.score = lambda text: sum(int(w[1:]) < 300 for w in text.split()) / max(1, len(text.split()))

    def __call__(self, prompts: list[str], responses: list[str]) -> torch.Tensor:
        found = [float(self.score(text)) for text in responses]
        self.means.append((time.process_time(), statistics.fmean(found)))
        return torch.tensor(found)

    def of_trl(self, completions: list[Any], **_: Any) -> list[float]:
        texts = [x if isinstance(x, str) else x[0]["content"] for x in completions]  # or messages
        return self([], texts).tolist()


def make_small(folder: Path) -> None:
    import tokenizers
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "vocab_size": 3_000,
    }
    options: dict[str, Any] = {"num_hidden_layers": 4, "tie_word_embeddings": True, "bos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **options, eos_token_id=2_999, pad_token_id=2_999)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(2_999)} | {"</s>": 2_999}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    tokenizer(tokenizer_object=inner, eos_token="</s>", pad_token="</s>").save_pretrained(folder)


class Turns:
    """Waits for a turn, and says what was done in it."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.until, self.began, self.count = reward, 0.0, 0.0, 0

    def iterated(self) -> None:
        """Called after each iteration; blocks while it is the others' turn."""
        self.count += 1
        if time.process_time() < self.until:
            return
        if self.until:
            done = {"iterations": self.count, "cpu": time.process_time() - self.began, "rewards": self.reward.means}
            done["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        else:
            done = {}
        print(json.dumps(done), file=OUT, flush=True)
        if not (line := sys.stdin.readline()).strip():
            os._exit(0)
        self.count, self.began = 0, time.process_time()
        self.until = self.began + float(line)


def ours(method: str, case: Case, folder: str, texts: list[str], reward: Reward, turns: Turns) -> None:
    options: Any = {"num_envs": case.responses, "samples": case.group, "length": case.length}
    env = LanguageEnv(texts, PretrainedTokens(folder, case.chat), [reward], **options)
    policy = language_policy(*load(folder), tokens=env.action_space.n)  # pyright: ignore
    penalty: Any = "reward" if method == "rloo" else "loss"
    parts: Any = {"policy": policy, "reference": Reference(policy, case.coef, penalty=penalty), "gamma": 1.0}
    parts |= {"lr": case.lr, "optim": OPTIM, "max_grad_norm": 1.0, "normalize_advantage": "none"}
    if method == "rloo":
        algorithm: Any = Reinforce(**parts, estimator=RLOO(group=case.group))
    else:
        parts |= {"critic": Critic(policy.obs_norm, shared=policy), "value_coef": 0.0, "minibatches": 1}
        parts |= {"generator": seeding.generator(0, "minibatches")}
        algorithm = PPO(**parts, estimator=GRPO(group=case.group), epochs=case.epochs)
    collector = GenerationCollector(env, env.max_episode_steps)
    while True:
        algorithm.iterate(collector)
        turns.iterated()


def trl(method: str, case: Case, folder: str, texts: list[str], reward: Reward, turns: Turns) -> None:
    import transformers
    from datasets import Dataset  # pyright: ignore
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # pyright: ignore

    epochs = 1 if method == "rloo" else case.epochs
    config, trainer = (RLOOConfig, RLOOTrainer) if method == "rloo" else (GRPOConfig, GRPOTrainer)
    options: dict[str, Any] = {"per_device_train_batch_size": case.responses, "num_generations": case.group}
    options |= {"max_completion_length": case.length, "beta": case.coef, "learning_rate": case.lr}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 1.0, "num_iterations": epochs, "max_steps": 10**6}
    options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    options |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "temperature": 1.0}
    if method == "grpo":
        options |= {"loss_type": "bnpo"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % epochs == 0:
                turns.iterated()

    given = [[{"role": "user", "content": text}] if case.chat else text for text in texts]
    trainer(
        model=model,
        reward_funcs=reward.of_trl,
        args=config(output_dir=tempfile.mkdtemp(), **options),
        train_dataset=Dataset.from_list([{"prompt": x} for x in given]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[Watch()],
    ).train()


class Contender:
    """A process that works when it is asked to, and waits otherwise."""

    def __init__(self, library: str, method: str, case: str, model: str) -> None:
        self.library, self.method, self.errors = library, method, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--contender", library, method, case, "--model", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Contender:
        self.hear()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            self.errors.seek(0)
            raise SystemExit(f"{self.library}, {self.method} has died:\n{self.errors.read()[-2000:]}")
        return json.loads(line)

    def run(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdin
        print(seconds, file=self.process.stdin, flush=True)
        return self.hear()


def measure(case: str, method: str, model: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        started = [Contender(x, method, case, model) for x in LIBRARIES]
        every = [stack.enter_context(x) for x in started]
        rows = [{"library": x.library, "method": x.method, "rates": []} for x in every]
        for i in range(rounds):
            for row, contender in list(zip(rows, every, strict=True))[:: 1 if i % 2 == 0 else -1]:
                done = contender.run(seconds)
                row["rates"].append(done["iterations"] / done["cpu"])
                row |= {"memory": done["memory"], "rewards": done["rewards"]}
                label = f"{case}: round {i + 1}: {row['library']}, {row['method']}"
                print(f"{label}: {row['rates'][-1]:.3f} iterations/s, {row['memory']:.2f} GB", flush=True)
    return rows


def text(case: str, result: dict[str, Any]) -> str:
    """Medians of the rates; the mean reward of the last quarter of the CPU time that both had."""
    about = CASES[case]
    shape = f"{about.responses} responses of up to {about.length} tokens in groups of {about.group}"
    lines = [
        f"### {about.words}: {shape}",
        "",
        "| | iterations per CPU minute | faster by | peak memory, GB | reward |",
    ]
    lines.append("|---|---|---|---|---|")
    for method in METHODS:
        rows = {row["library"]: row for row in result["rows"] if row["method"] == method}
        pairs = zip(rows["pgsuite"]["rates"], rows["trl"]["rates"], strict=True)
        ratio = statistics.median(x / y for x, y in pairs)
        last = min(row["rewards"][-1][0] for row in rows.values())
        for library, row in rows.items():
            late = [x for t, x in row["rewards"] if 0.75 * last < t <= last]
            reward = f"{statistics.fmean(late):.3f}" if len(late) >= FEWEST else ""
            rate, faster = 60 * statistics.median(row["rates"]), f"{ratio:.2f}" if library == "pgsuite" else ""
            numbers = f"{rate:.1f} | {faster} | {row['memory']:.2f} | {reward}"
            lines.append(f"| {method.upper()}, {library} | {numbers} |")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", *PEERS))
    caption = f"Medians of {len(result['rows'][0]['rates'])} interleaved rounds of {result['seconds']:g} s of CPU time"
    return "\n".join([*lines, "", f"{caption}; {result['machine']}; commit {result['commit']}; {versions}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--model", default="smollm2", help="the directory of SmolLM2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU time, of each turn")
    parser.add_argument("--docs", action="store_true", help="put the kept results into docs/howto/alignment.md")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        library, method, case = args.contender
        torch.set_num_threads(1)
        reward = Reward(case)
        work = ours if library == "pgsuite" else trl
        work(method, CASES[case], args.model, prompts(case), reward, Turns(reward))
    elif args.docs:
        kept = {name: KEPT / f"{name}.json" for name in CASES}
        found = [text(name, json.loads(path.read_text())) for name, path in kept.items() if path.exists()]
        write_table("docs/howto/alignment.md", "language_peers.py --docs", "\n".join(found))
    else:
        for name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                if name == "small":
                    make_small(Path(folder))
                result = source() | {"seconds": args.seconds}
                result["versions"] |= {peer: version(peer) for peer in PEERS}
                model = folder if name == "small" else args.model
                each = [measure(name, method, model, args.rounds, args.seconds) for method in METHODS]
                result["rows"] = [row for rows in each for row in rows]
            print(text(name, result))
            keep(result, KEPT / f"{name}.json")


if __name__ == "__main__":
    # Libraries write to stdout, which is for the answers of a contender.
    OUT = os.fdopen(os.dup(1), "w")
    if "--contender" in sys.argv:
        os.dup2(2, 1)
    main()
