"""The metrics of a run: metrics.jsonl and its TensorBoard file, as training writes them and other tools read them."""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_flax.runtime import files, run_dir
from mnist_flax.runtime.cli import UserError


class Metrics:
    """metrics.jsonl and the TensorBoard file of a run: one record an epoch and split, in order."""

    def __init__(self, directory: Path | None, text: str):
        """Starts from the lines that a restored checkpoint holds: both files are written anew, and hold no others.

        Without a directory nothing is written: another process of the job does that.
        """
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        self.text = text  # of metrics.jsonl; put together only once, since a checkpoint takes all of it every epoch
        self.records: list[dict] = [json.loads(line) for line in text.splitlines()]
        self._tensorboard: Any = None
        if directory is None:
            return
        self._path = directory / "metrics.jsonl"
        files.write(self._path, text.encode())
        events = directory / run_dir.TENSORBOARD
        events.mkdir(exist_ok=True)
        for earlier in events.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._began = time.time() - (self.records[-1]["seconds"] if self.records else 0)
        # Written by this thread: the thread of a SummaryWriter keeps lines back for minutes, and dies of a full disk.
        self._tensorboard = event_file_writer.EventsWriter(str(events / "events"), f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # has TensorBoard forget what it showed before
        self._tensorboard.write_event(event_pb2.Event(wall_time=self._began, step=0, session_log=start))
        self._add_to_tensorboard(self.records)

    def append(self, *records: dict) -> None:
        """Adds the records of an epoch; they are on the disk when this returns."""
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        self.records += records
        self.text += lines
        if self._tensorboard is None:
            return
        with self._path.open("a") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._add_to_tensorboard(records)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _add_to_tensorboard(self, records: Sequence[dict]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        for record in records:
            for name, value in record.items():
                if name not in ("step", "epoch", "split") and value is not None:
                    scalar = summary.scalar(f"{record['split']}/{name}", value)
                    wall_time = self._began + record["seconds"]
                    self._tensorboard.write_event(Event(wall_time=wall_time, step=record["step"], summary=scalar))
        self._tensorboard.flush()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that was cut short is left out.

    Raises:
      UserError: there is none, or a line is no record.
    """
    try:
        lines = run_dir.read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the directory of a finished run") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut short, or is empty
        try:
            record = json.loads(line)
            if record["split"] not in ("train", "validation") or type(record["epoch"]) is not int:
                raise ValueError
            if not 1 <= record["epoch"] < 2**31:
                raise ValueError
            numbers = {name: float(record[name]) for name in ("loss", "accuracy", "learning_rate")}
            if not all(0 <= number < math.inf for number in numbers.values()) or numbers["accuracy"] > 1:
                raise ValueError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is damaged: restore the file, or train anew") from error
        records.append({**record, **numbers})
    if not records:
        raise UserError(f"{path} has no record yet: let the run finish an epoch")
    return records
