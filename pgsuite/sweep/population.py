"""Population-based training (Jaderberg et al., 2017): ``sweep=population``.

All members train for a turn, a fraction of the run.  Then those with the lowest returns continue from checkpoints of
those with the highest, with settings that are perturbed or drawn anew.  Each member has a directory for each turn,
which is not written once the turn is over, and is removed when all of the next turn have begun; so a population that
was killed at any moment goes on bit for bit, where its environments can be resumed exactly.
"""

from __future__ import annotations

import math
import random
import shutil
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import yaml

from pgsuite import seeding
from pgsuite.app.api import composed
from pgsuite.app.build import to_dict
from pgsuite.app.train import Outcome, remove_empty, short
from pgsuite.errors import UserError, command, counted
from pgsuite.settings import Fraction, Range
from pgsuite.sweep.search import spelled
from pgsuite.sweep.workers import ASKED, Ended, Job, Plan, Pool, SettingsSweep, first
from pgsuite.training import checkpoint
from pgsuite.training.run_lock import CONFIG
from pgsuite.training.trainer import Callback, Report, Trainer

Share = Annotated[float, Range(0, 0.5)]
Factor = Annotated[float, Range(1, open=True)]
TURN_OVER = "turn over"
COPIED = ("metrics.csv", "evaluation.csv")  # which then tell the whole history of a member


@dataclass(kw_only=True)
class Turn(Callback):
    """Ends a run at the end of a turn.  What continues from the checkpoint of another draws other random numbers."""

    begin: int  # environment steps of the checkpoint that it continues from
    end: int  # environment steps
    apart: int  # how often to reseed at the beginning; 0 continues the random streams

    def on_start(self, trainer: Trainer) -> None:
        if self.apart and trainer.steps <= self.begin:
            for _ in range(self.apart):
                trainer.collector.reseed()
        self._end_if_over(trainer)

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self._end_if_over(trainer)

    def _end_if_over(self, trainer: Trainer) -> None:
        if trainer.steps >= self.end:
            trainer.end_early(TURN_OVER)


@dataclass(kw_only=True)
class Population(SettingsSweep):
    """A population of runs that adopt the parameters and perturb the settings of the best."""

    size: Annotated[int, Range(2)] = 8  # members
    turns: Annotated[int, Range(2)] = 10  # parts of the run, after each of which the worst continue from the best
    exploit: Share = 0.25  # fraction of the members, at least one, that is replaced, and that replaces
    resample: Fraction = 0.25  # probability that a setting is drawn anew from its range rather than perturbed
    factor: Factor = 1.25  # by which a perturbed setting is multiplied or divided

    def run(self, plan: Plan, pool: Pool) -> float | None:
        for name, x in plan.space.items():
            if not name.startswith("algo.") or any(
                isinstance(v, bool) or not isinstance(v, int | float) for v in x.values
            ):
                raise UserError(
                    f"a population varies numbers of the method while it trains, and sweep.space.{name} is none: "
                    f"sweep.space.{name}=null leaves it out"
                )
        names = ("size", "turns", "exploit", "resample", "factor", "at_once")
        own = {f"sweep.{name}": getattr(self, name) for name in names}
        record = plan.record("population", **own)
        turns: list[list[dict[str, Any]]] = record.setdefault("turns", [])
        if turns:
            plan.say(f"goes on in turn {len(turns)} of {self.turns}")
        for turn in range(self.turns):
            if turn == len(turns):
                turns.append(self._members(turn, turns, plan))
                plan.write(record)
            if any("return" not in member for member in turns[turn]):
                self._train(turn, turns, plan, pool, record)
            if pool.asked:
                return None
        return self._conclude(turns[-1], plan)

    def _members(self, turn: int, turns: list[list[dict[str, Any]]], plan: Plan) -> list[dict[str, Any]]:
        """The settings of the members of a turn, and from which member of the turn before each continues."""
        generator = random.Random(seeding.number(plan.config["seed"], f"turn {turn}"))
        if turn == 0:
            return [{"from": None, "values": _drawn(plan, generator)} for _ in range(self.size)]
        before = turns[turn - 1]
        scores = [-math.inf if member["return"] is None else member["return"] for member in before]
        if max(scores) == -math.inf:
            raise UserError(f"no member of {plan.folder} has a return; the last messages are in its .log files")
        ranked = sorted(range(self.size), key=lambda i: (scores[i], -i), reverse=True)
        count = max(1, int(self.size * self.exploit))
        best = [i for i in ranked[:count] if scores[i] > -math.inf]
        found = []
        for i, member in enumerate(before):
            if i in ranked[-count:] or scores[i] == -math.inf:
                source = generator.choice(best)
                found.append({"from": source, "values": self._explored(before[source]["values"], plan, generator)})
            else:
                found.append({"from": i, "values": member["values"]})
        return found

    def _explored(self, values: dict[str, Any], plan: Plan, generator: random.Random) -> dict[str, Any]:
        def explore(name: str, value: Any) -> Any:
            dimension = plan.space[name]
            if generator.random() < self.resample:
                return dimension.draw(generator)
            return dimension.perturbed(value, self.factor, generator)

        return {name: explore(name, value) for name, value in values.items()}

    def _train(
        self, turn: int, turns: list[list[dict[str, Any]]], plan: Plan, pool: Pool, record: dict[str, Any]
    ) -> None:
        """Train all members to the end of a turn."""
        members, steps = turns[turn], plan.config["total_steps"]
        begins = [turns[turn - 1][member["from"]]["steps"] if turn else 0 for member in members]
        for i, member in enumerate(members):
            if turn:
                _begin(plan, _folder(plan, turn, i), _folder(plan, turn - 1, member["from"]), member["values"], i)
        for earlier in range(turn):  # all that continues from them has been copied
            _reduce(_folder(plan, earlier, 0).parent)
        waiting = [i for i, member in enumerate(members) if "return" not in member]
        going: dict[Future[list[Ended]], list[int]] = {}
        while True:
            while waiting and len(going) < self.jobs and not pool.asked:
                chosen, waiting = waiting[: self.at_once], waiting[self.at_once :]
                jobs = []
                for i in chosen:
                    folder, member = _folder(plan, turn, i), members[i]
                    folder.parent.mkdir(exist_ok=True)
                    apart = 0 if member["from"] in (None, i) else i + 1
                    part = Turn(begin=begins[i], end=steps * (turn + 1) // self.turns, apart=apart)
                    jobs.append(Job(_seeded(plan, i), folder, member["values"], [part]))
                going[pool.submit(jobs)] = chosen
            if not going:
                break
            for i, outcome in first(going):
                if isinstance(outcome, Outcome) and (outcome.stopped or outcome.ended_early == ASKED):
                    continue
                member = members[i]
                if isinstance(outcome, Outcome):
                    member |= {"steps": outcome.steps, "return": _return(_folder(plan, turn, i), begins[i])}
                    how = f"return {member['return']:,.1f}"
                else:
                    member["return"] = None
                    how = f"failed: {outcome}"
                lineage = f" from {member['from']}" if member["from"] not in (None, i) else ""
                plan.say(f"turn {turn + 1} of {self.turns}, member {i}{lineage}: {how} | {spelled(member['values'])}")
            plan.write(record)  # of runs at once together, so that they go on together

    def _conclude(self, members: list[dict[str, Any]], plan: Plan) -> float | None:
        done = [i for i, member in enumerate(members) if member["return"] is not None]
        if not done:
            raise UserError(f"no member of {plan.folder} has a return; the last messages are in its .log files")
        best = max(done, key=lambda i: members[i]["return"])
        folder = _folder(plan, self.turns - 1, best)
        value = members[best]["return"]
        plan.say(
            f"best of {counted(self.size, 'member')}: {best}, return {value:,.1f} | "
            f"{command('evaluate')} run={short(folder)}"
        )
        return value


def _folder(plan: Plan, turn: int, member: int) -> Path:
    return plan.folder / f"turn-{turn + 1:03d}" / f"member-{member:02d}"


def _seeded(plan: Plan, member: int) -> Plan:
    """The plan with the seed of a member."""
    others = [x for x in plan.overrides if x.partition("=")[0] != "seed"]
    return replace(plan, overrides=[*others, f"seed={plan.config['seed'] + member}"])


def _drawn(plan: Plan, generator: random.Random) -> dict[str, Any]:
    return {name: dimension.draw(generator) for name, dimension in plan.space.items()}


def _begin(plan: Plan, folder: Path, source: Path, values: dict[str, Any], member: int) -> None:
    """Make the directory of a member's turn, with the last checkpoint of what it continues from: whole, or not."""
    if folder.exists():
        return
    shutil.rmtree(made := folder.with_suffix(".begun"), ignore_errors=True)  # of a process that was killed
    (made / checkpoint.FOLDER).mkdir(parents=True)
    last = checkpoint.numbered(source)[-1]
    checkpoint.link(last, made / checkpoint.FOLDER / last.name)
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, made / name)
    with composed([*_seeded(plan, member).given(values), *plan.threads]) as (cfg, _):
        (made / CONFIG).write_text(yaml.safe_dump(to_dict(cfg), sort_keys=False))
    made.rename(folder)


def _reduce(turn: Path) -> None:
    """Leave of an earlier turn what is small: the course of its members, also of those that were replaced."""
    for path in sorted(turn.rglob("*"), reverse=True):  # what is in a directory before it
        if path.is_dir():
            remove_empty(path)
        elif path.name not in COPIED:
            path.unlink()


def _return(folder: Path, begin: int) -> float:
    """The return of a turn: of its last evaluation, or the mean over its episodes, as far as they are among the recent
    ones of its checkpoint; if none has ended, over the recent ones."""
    state = checkpoint.load_run_checkpoint(checkpoint.numbered(folder)[-1])
    if evaluation := (state["callbacks"].get("Evaluate") or {}).get("last"):
        return evaluation["return"]
    own = [x for steps, x in state["finished"] if steps > begin]
    return fmean(own or [x for _, x in state["finished"]] or state["tracker"]["reward"].tolist())
