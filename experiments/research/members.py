"""Populations: many models trained as one compiled program, each with a seed and hyperparameters of its own.

A member is what `mnist_flax.main` would train: the same step, order and randomness, so its result is that of training
it alone. Members share a program if they differ only in what the compiled step takes as arguments: seed, continuous
hyperparameters, length of the schedule, number of training examples. Others are grouped, each group compiled once.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int32
from ml_collections import ConfigDict

from mnist_flax.data import datasets
from mnist_flax.data.feed import Block
from mnist_flax.experiments.benchmarks import cores
from mnist_flax.models.cnn import make_model
from mnist_flax.runtime import cli, devices
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime.settings import pinned
from mnist_flax.training import augment, photometric, scoring
from mnist_flax.training.state import TrainState, hyperparameters, init_state
from mnist_flax.training.step import make_train_step, run_steps

MEMBER_AXIS = "member"
_INITIALIZER = ThreadPoolExecutor(1)
_SHARED = ("dataset", "data_dir", "archive_dir", "validation_examples", "eval_batch_size")
_OWN = ("seed", "num_epochs", "train_examples")  # besides the continuous fields
_UNUSED = ("feed", "checkpoint.keep")
# Off costs less than a strength of 0, so whether these are on decides the program; each entry is one piece of work.
_WORK = (
    tuple(f"augment.{kind}" for kind in augment.MOVES),
    tuple(f"augment.{kind}" for kind in photometric.KINDS),
)


class Record(NamedTuple):
    """What is known of a member after it was evaluated on the validation split."""

    step: int
    epoch: float
    train_loss: float  # mean since the epoch began
    loss: float
    accuracy: float


def check_population(configs: Sequence[ConfigDict]) -> None:
    """Refuses configs that cannot be one population.

    Raises:
      UserError: a config that training would refuse, fields that all members must share, or an early stop.
    """
    for config in configs:
        config_lib.check_config(config)
        if config.checkpoint.select != "last" or config.patience or config.target_accuracy:
            raise cli.UserError(
                "a population trains every member to its end: leave config.checkpoint.select=last, "
                "config.patience=0 and config.target_accuracy=0.0"
            )
        if config.debug:
            raise cli.UserError("config.debug=True is for single runs: train the member by itself with mnist_flax.main")
        for key in _SHARED:
            if config[key] != configs[0][key]:
                raise cli.UserError(f"config.{key} must be the same for all members of a population")


def program_key(config: ConfigDict) -> tuple:
    """What decides the compiled program: members with equal keys share it."""
    fields = config_lib.flatten(config)
    own = {*hyperparameters(config), *_OWN, *_UNUSED, *_SHARED}
    static = tuple((key, value) for key, value in sorted(fields.items()) if key not in own)
    return (*static, *(any(fields[key] > 0 for key in keys) for keys in _WORK))


def merged(configs: Sequence[ConfigDict]) -> tuple[ConfigDict, dict[str, Float[np.ndarray, " members"]]]:
    """The config to compile for members of one key, and their hyperparameters.

    A link that any member needs is compiled for all; its value 0, or an infinite norm to clip at, is no link.
    """
    hyper = [hyperparameters(config) for config in configs]
    columns = {key: np.array([h[key] for h in hyper], np.float32) for key in hyper[0]}
    config = configs[0].copy_and_resolve_references()
    with config.unlocked():
        continuous = {key: float(column.max()) for key, column in columns.items() if key != "num_epochs"}
        config.update_from_flattened_dict(continuous)
    clip = columns["optimizer.clip_norm"]
    columns["optimizer.clip_norm"] = np.where(clip > 0, clip, np.inf).astype(np.float32)
    return config, columns


def use_all_cores() -> None:
    """Makes each CPU core a device of its own, unless JAX was told otherwise; before JAX is used.

    One core a member wastes nothing on waiting, where two that share one small model do.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not told and jax.config.values["jax_num_cpu_devices"] < 1:
        jax.config.update("jax_num_cpu_devices", len(cores.usable()))


def make_mesh() -> Mesh:
    """All devices, each with its share of the members; a batch is never split."""
    return Mesh(np.array(devices.available()).reshape(-1, 1), (MEMBER_AXIS, devices.BATCH_AXIS))


@lru_cache(maxsize=256)
def _order(seed: int, epoch: int, examples: int, batch_size: int) -> np.ndarray:
    return datasets.epoch_order(seed, epoch, examples, batch_size)


class Member(NamedTuple):
    """One model to train."""

    config: ConfigDict
    rows: Int32[np.ndarray, " examples"]  # its training examples, as rows of the population's training split
    steps_per_epoch: int
    total_steps: int

    def order(self, start: int, stop: int) -> Int32[np.ndarray, "steps batch"]:
        """Rows of the training split that make the batches of steps [start, stop)."""
        epochs = range(start // self.steps_per_epoch, -(-stop // self.steps_per_epoch))
        size = self.config.batch_size
        parts = [_order(self.config.seed, epoch, len(self.rows), size) for epoch in epochs]
        first = start - epochs.start * self.steps_per_epoch
        return self.rows[np.concatenate(parts)[first : first + stop - start]]


def make_member(config: ConfigDict, splits: datasets.Splits) -> Member:
    """Raises UserError if there are too few training examples for the config."""
    available = len(splits.train.labels)
    count = available if config.train_examples is None else config.train_examples
    if not config.batch_size <= count <= available:
        raise cli.UserError(
            f"config.train_examples={count} does not fit: use {config.batch_size} (the batch size) to {available:,}"
        )
    rows = (
        datasets.stratified(splits.train.labels, count) if count < available else np.arange(available, dtype=np.int32)
    )
    steps_per_epoch = count // config.batch_size
    return Member(config, rows, steps_per_epoch, steps_per_epoch * config.num_epochs)


class Programs:
    """Compiled programs, by what decides them, with the data they work on; kept from population to population."""

    @classmethod
    def load(cls, config: ConfigDict) -> "Programs":
        """For populations like this config, on all devices. Raises UserError if its data cannot be had."""
        datasets.check_sizes(config)
        everything = config.copy_and_resolve_references()
        everything.train_examples = None
        mesh = make_mesh()
        splits = datasets.load(everything)
        devices.keep_compiled_programs()
        # `map` trains a device's members in turn, best where one fills the device; `vmap` in step with each other.
        mapping = "map" if jax.default_backend() == "cpu" else "vmap"
        return cls(splits, len(datasets.CLASS_NAMES[config.dataset]), mesh, mapping, config.eval_batch_size)

    def __init__(self, splits: datasets.Splits, num_classes: int, mesh: Mesh, mapping: str, eval_batch_size: int):
        self.splits, self.mesh, self.mapping = splits, mesh, mapping
        self._num_classes = num_classes
        self._compiled: dict[tuple, tuple[Callable, Callable, Callable]] = {}
        self._train = jax.device_put(tuple(splits.train), NamedSharding(mesh, P()))
        self._batches = {
            name: _batches(mesh, split, eval_batch_size)
            for name, split in (("validation", splits.validation), ("test", splits.test))
        }

    def get(self, config: ConfigDict) -> tuple[tuple[Callable, Callable, Callable], bool]:
        """`init(seeds)`, `advance(states, hyper, seeds, steps_per_epoch, order, steps)` and `test(states, hyper)`.

        And whether they are new, so that calling them will compile them.
        """
        # Which of the cheap links are there decides the shapes of a state too, so it counts here.
        key = (program_key(config), *(value > 0 for value in hyperparameters(config).values()))
        new = key not in self._compiled
        if new:
            self._compiled[key] = self._make(config)
        return self._compiled[key], new

    def _make(self, config: ConfigDict) -> tuple[Callable, Callable, Callable]:
        def one(images, labels, validation, state, hyper, seed, steps_per_epoch, order, steps):
            step = make_train_step(config, self._num_classes, steps_per_epoch)
            state = run_steps(step, state, hyper, seed, Block(images, labels, order, 0, steps))
            none = {"loss": jnp.float32(jnp.nan), "accuracy": jnp.float32(jnp.nan)}
            scores = lax.cond(steps > 0, lambda: score(state, hyper, validation), lambda: none) if validation else none
            return state, scores | {"step": state.step, "sums": state.sums}

        def score(state, hyper, batches):
            model = make_model(config.model, hyper, self._num_classes)
            return scoring.evaluate_batches(model, state.variables(), *batches)[0]

        over = P(MEMBER_AXIS)
        shard = partial(jax.shard_map, mesh=self.mesh, check_vma=False, out_specs=over)

        def spread(function: Callable, *shared) -> Callable:
            """`function(*shared, *own)` for every member, split over the devices; `own` have a leading axis."""

            def members(shared, own):
                if self.mapping == "vmap":
                    return jax.vmap(partial(function, *shared))(*own)
                return lax.map(lambda member: function(*shared, *member), own)

            return lambda *own: shard(members, in_specs=(P(), over))(shared, own)

        init = pinned()(jax.jit(spread(partial(init_state, config, self._num_classes))))  # called in a thread
        # The data are arguments: as constants they would be compiled into the program.
        advance = jax.jit(lambda shared, *own: spread(one, *shared)(*own), donate_argnums=1)
        test = jax.jit(lambda batches, *own: spread(lambda b, s, h: score(s, h, b), batches)(*own))
        return (
            init,
            partial(advance, (*self._train, self._batches["validation"])),
            partial(test, self._batches["test"]),
        )


def _batches(mesh: Mesh, split: datasets.Split, batch_size: int):
    if not len(split.labels):
        return None
    count = -(-len(split.labels) // batch_size)
    return scoring.split_batches(mesh, *split, -(-len(split.labels) // count))


class _Group:
    """Members of one program in training. Slots are places on the devices; a slot without a member takes no step."""

    def __init__(self, members: Sequence[Member], programs: Programs, capacity: int):
        self.members = members
        config, self._hyper = merged([member.config for member in members])
        self._programs = programs
        (init, self._advance, self._test), self._new = programs.get(config)
        self._devices = programs.mesh.shape[MEMBER_AXIS]
        self._sharding = NamedSharding(programs.mesh, P(MEMBER_AXIS))
        size = max(capacity, len(members)) if programs.mapping == "map" else len(members)
        self._slots = self._deal(np.arange(len(members)), -(-size // self._devices))
        seeds = np.array([member.config.seed for member in members], np.int32)
        self._own = (seeds, np.array([member.steps_per_epoch for member in members], np.int32))
        first_seeds = self._put(seeds)
        self._abstract = jax.eval_shape(init, first_seeds)
        self._states: TrainState | None = None
        self._fresh = _INITIALIZER.submit(init, first_seeds)

    def _deal(self, members: np.ndarray, share: int) -> Int32[np.ndarray, " slots"]:
        """Which member is in which slot (-1 is none): the longest first, in turn to each device."""
        slots = np.full((self._devices, share), -1, np.int32)
        longest = sorted(members, key=lambda i: -self.members[i].total_steps)
        for turn, member in enumerate(longest):
            slots[turn % self._devices, turn // self._devices] = member
        return slots.ravel()

    def _taken(self) -> list[tuple[int, int]]:
        """Slots that have a member, and which."""
        return [(slot, int(i)) for slot, i in enumerate(self._slots) if i >= 0]

    def _current(self) -> TrainState:
        return self._fresh.result() if self._states is None else self._states

    def _put(self, column: np.ndarray) -> jax.Array:
        """Values of the members, in their slots."""
        return jax.device_put(column[np.maximum(self._slots, 0)], self._sharding)

    def keep(self, members: np.ndarray) -> None:
        """Moves these members together, so that every device has as many; the others' states are given up."""
        share = len(self._slots) // self._devices
        if self._programs.mapping == "vmap":
            share = -(-len(members) // self._devices)
        place = {member: slot for slot, member in self._taken()}
        self._slots = self._deal(members, share)
        take = np.array([place.get(member, 0) for member in self._slots], np.int32)  # there may be none
        self._states = jax.device_put(jax.tree.map(lambda x: x[take], self._current()), self._sharding)

    def advance(self, start: np.ndarray, stop: np.ndarray) -> dict[int, Record]:
        """Trains each member from step `start` to `stop` ([members], equal where it rests), and evaluates it."""
        batch_size = self.members[0].config.batch_size
        rows = 1 << (int(max(stop - start)) - 1).bit_length()  # powers of two: few shapes to compile
        order = np.zeros((len(self._slots), rows, batch_size), np.int32)
        steps = np.zeros(len(self._slots), np.int32)
        for slot, i in self._taken():
            if stop[i] > start[i]:
                steps[slot] = stop[i] - start[i]
                order[slot, : steps[slot]] = self.members[i].order(start[i], stop[i])
        hyper = {key: self._put(column) for key, column in self._hyper.items()}
        own = (hyper, *map(self._put, self._own), *jax.device_put((order, steps), self._sharding))
        if self._states is None and self._new:
            # Compiles while `init` is compiled in its thread, and runs no step.
            empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._abstract)
            idle = (*own[:-1], jax.device_put(np.zeros_like(steps), self._sharding))
            self._advance(jax.device_put(empty, self._sharding), *idle)
        self._states, scores = self._advance(self._current(), *own)
        scores = jax.device_get(scores)
        return {
            i: self._record(self.members[i], jax.tree.map(lambda x: x[slot], scores))  # noqa: B023
            for slot, i in self._taken()
            if steps[slot]
        }

    @staticmethod
    def _record(member: Member, scores: Mapping) -> Record:
        sums, step = scores["sums"], int(scores["step"])
        train_loss = float(sums.loss) / max(int(sums.examples), 1)
        return Record(step, step / member.steps_per_epoch, train_loss, float(scores["loss"]), float(scores["accuracy"]))

    def test(self) -> dict[int, dict[str, float]]:
        hyper = {key: self._put(column) for key, column in self._hyper.items()}
        scores = jax.device_get(self._test(self._current(), hyper))
        return {i: {key: float(value[slot]) for key, value in scores.items()} for slot, i in self._taken()}

    def states(self) -> dict[int, TrainState]:
        states = jax.device_get(self._current())
        return {i: jax.tree.map(lambda x: x[slot], states) for slot, i in self._taken()}  # noqa: B023


class Population:
    """Members of any programs, trained together from evaluation to evaluation."""

    @pinned()
    def __init__(self, configs: Sequence[ConfigDict], programs: Programs, capacity: int = 0):
        """Draws initial parameters. Where it costs no time, programs are made for `capacity` members, and serve fewer.

        Raises:
          UserError: the configs cannot be one population.
        """
        check_population(configs)
        self.members = [make_member(config, programs.splits) for config in configs]
        self.records: list[list[Record]] = [[] for _ in configs]
        self._steps = np.zeros(len(configs), np.int64)
        keys = [program_key(config) for config in configs]
        self._groups = []
        for key in dict.fromkeys(keys):
            indices = [i for i, other in enumerate(keys) if other == key]
            self._groups.append((indices, _Group([self.members[i] for i in indices], programs, capacity)))

    @property
    def diverged(self) -> Bool[np.ndarray, " members"]:
        """Whose training loss became NaN or infinite; such a member stopped there."""
        return np.array([bool(r) and not np.isfinite(r[-1].train_loss) for r in self.records])

    @pinned()
    def advance(self, fraction: float, active: Bool[np.ndarray, " members"]) -> None:
        """Trains the active members to this fraction of their steps, and adds a record of each."""
        totals = np.array([member.total_steps for member in self.members])
        targets = np.where(active & ~self.diverged, np.ceil(np.round(totals * fraction, 6)).astype(int), self._steps)
        for indices, group in self._groups:
            start, stop = self._steps[indices], np.maximum(targets, self._steps)[indices]
            if (stop > start).any():
                for i, record in group.advance(start, stop).items():
                    self.records[indices[i]].append(record)
        self._steps = np.maximum(targets, self._steps)

    @pinned()
    def keep(self, active: Bool[np.ndarray, " members"]) -> None:
        """Gives up all other members for good, which spreads the active ones evenly over the devices."""
        for indices, group in self._groups:
            group.keep(np.flatnonzero(active[indices]))

    @pinned()
    def test(self) -> list[dict[str, float] | None]:
        """Loss and accuracy on the test split of every member that was kept; None for others and the diverged."""
        scores: list[dict[str, float] | None] = [None] * len(self.members)
        for indices, group in self._groups:
            for i, score in group.test().items():
                scores[indices[i]] = None if self.diverged[indices[i]] else score
        return scores

    @pinned()
    def states(self) -> list[TrainState | None]:
        """The states of the members that were kept, on the host."""
        states: list[TrainState | None] = [None] * len(self.members)
        for indices, group in self._groups:
            for i, state in group.states().items():
                states[indices[i]] = state
        return states


def with_fields(config: ConfigDict, fields: Mapping[str, object]) -> ConfigDict:
    """A copy of a config in which dotted fields have other values; references to them follow, as in a recipe."""
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict(dict(fields))
    return changed
