"""Remembers every objective's score of every text, so that a search scores the same answer to the same prompt once.

Close candidates mostly give the same texts. The memory is a SQLite file, which survives a kill and serves several workers.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from emorl.config import UserError
from emorl.objectives.loading import Objective

_WAIT_SECONDS = 60.0  # for another worker's commit, which takes milliseconds
_AT_ONCE = 500  # parameters of one SELECT


class ScoreMemo:
    """Scores by objective, prompt row and completion.

    with ScoreMemo(Path("scores.sqlite")) as memo:
        memo.score(objective, prompts, completions, columns)
    """

    def __init__(self, path: Path | None) -> None:
        """Opens `path`, made if it is not there; None keeps everything in memory.

        Raises:
            UserError: the file is damaged.
        """
        self.known = self.scored = 0  # texts that were remembered, and that an objective had to score
        try:
            self._database = sqlite3.connect(path or ":memory:", timeout=_WAIT_SECONDS)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS scores (objective TEXT, text BLOB, score REAL, PRIMARY KEY (objective, text)) "
                "WITHOUT ROWID"
            )
        except sqlite3.OperationalError:
            raise  # of a full disk or one that can only be read
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is damaged ({error}); move it away, its texts are then scored again") from None

    def score(
        self, objective: Objective, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """Scores in the given order; the objective is called once, with each text that is new. What it finds is kept
        before this returns; a text without a score is tried again the next time: a judge may have been out of reach.

        Args:
            columns: the data set's other columns, one entry per completion: another row is another text.
        """
        keys = _digests(prompts, completions, columns)
        known = self._look_up(objective.key, list(dict.fromkeys(keys)))
        new: dict[bytes, int] = {}  # text -> its first position
        for position, key in enumerate(keys):
            if key not in known:
                new.setdefault(key, position)
        if new:
            scores = objective(
                [prompts[position] for position in new.values()],
                [completions[position] for position in new.values()],
                **{name: [values[position] for position in new.values()] for name, values in columns.items()},
            )
            found = dict(zip(new, scores, strict=True))
            with self._database:
                rows = [(objective.key, key, score) for key, score in found.items() if score is not None]
                self._database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)
            known |= found
        self.known += len(keys) - len(new)
        self.scored += len(new)
        return [known[key] for key in keys]

    def _look_up(self, objective: str, keys: Sequence[bytes]) -> dict[bytes, float | None]:
        known: dict[bytes, float | None] = {}
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            places = ",".join("?" * len(part))
            query = f"SELECT text, score FROM scores WHERE objective = ? AND text IN ({places})"
            known.update(self._database.execute(query, [objective, *part]).fetchall())
        return known

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _digests(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[bytes]:
    """One key per completion, of it and its whole row: an edited data file finds nothing stale."""
    names = sorted(columns)
    keys = []
    for position, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        row = [prompt, completion, {name: columns[name][position] for name in names}]
        keys.append(hashlib.blake2b(json.dumps(row, default=str, sort_keys=True).encode(), digest_size=16).digest())
    return keys
