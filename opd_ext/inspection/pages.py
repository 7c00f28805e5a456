# SPDX-License-Identifier: Apache-2.0
"""One folder that a browser opens without a server: a page, an index, and data that it loads as they are looked at.

    index.html            the page, with its style and program
    data/index.js         methods, statistics, and one number per rollout and column: what lists, sorts and filters
    data/words.js         texts of all tokens that occur
    data/rollouts_<p>.js  page p of the rollouts: ids, what the student thinks of them, prompts
    data/<method>_<p>.js  the same page: one method's signals
    data/text_<p>.js      texts to search, loaded at the first search

A page from a file may not fetch, but it may load scripts, so every file is one call. Numbers are 16 bit between the
least and the greatest of their page: off by 1/131070 of that range at most.
"""

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from opd_ext.files import write_whole
from opd_ext.inspection.survey import FORKS, Row, forks

PAGE_TOKENS = 16384  # response tokens of a page, at most, unless one response is longer
PAGE_ROLLOUTS = 128
SEARCHED = 4000  # characters of a prompt, and of a response, that a search reads
SNIPPET = 110
SIGNALS = ("push", "loss", "divergence", "weight", "advantage", "clipped", "overlap", "policy", "reward", "gate")
_SHOWN = (*SIGNALS, "ratio", "log_prob", "entropy")  # of a token, where its method has them
_HELD = 1e-3  # a ratio that is changed by more than this share is one that a clip or cap acts on
_TOP = 12  # tokens that a method pushes most, listed

Numbers = Mapping[str, np.ndarray]


class Pages:
    """Takes rollouts one by one and writes a page whenever one is full.

    Args:
        folder: to write into.
        methods: names, in the order of the buttons.
        rewarded: those that have a policy term.
    """

    def __init__(self, folder: Path, methods: Sequence[str], rewarded: Collection[str] = ()) -> None:
        self.folder, self.methods = folder / "data", list(methods)
        self.rewarded = {name: name in rewarded for name in methods}
        self.folder.mkdir(parents=True)
        self.starts: list[int] = []
        self.count = 0
        self.columns: dict[str, list[float]] = {}
        self.labels: list[list[Any]] = []
        self.tokens: set[int] = set()
        self.scales: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in self.methods}
        self.pushed: dict[str, dict[int, list[float]]] = {name: {} for name in self.methods}
        self.student: dict[str, list[np.ndarray]] = {"surprise": [], "entropy": []}
        self._waiting: list[tuple[Row, Numbers, dict[str, Numbers | None]]] = []

    def add(self, row: Row, student: Numbers, signals: dict[str, Numbers | None]) -> None:
        """One rollout; ``row`` has ``prompt_text`` and, per method, ``teacher_prompts`` as texts."""
        size = sum(len(each["responses"]) for each, _, _ in self._waiting)
        full = size + len(row["responses"]) > PAGE_TOKENS or len(self._waiting) >= PAGE_ROLLOUTS
        if self._waiting and full:
            self._flush()
        self._waiting.append((row, student, signals))
        self._note(row, student, signals)
        self.count += 1

    def finish(self, about: Mapping[str, Any], words: Mapping[int, str], title: str) -> None:
        """The last page, the index and the page itself.

        Args:
            about: of the run: ``run``, ``step``, ``methods`` with their ``notes``, ``absent`` methods with reasons.
            words: text of every token that occurs.
        """
        self._flush()
        counted = {name: pack(np.array(values)) for name, values in self.columns.items()}
        methods = [
            {
                **said,
                "scales": self._scales(said["name"]),
                "stats": self._stats(said["name"]),
                "pushed": self._pushed(said["name"]),
            }
            for said in about["methods"]
        ]
        index = {
            **about,
            "methods": methods,
            "rollouts": self.count,
            "starts": self.starts,
            "labels": self.labels,
            "columns": counted,
            "student": {name: self._student_scale(name) for name in ("surprise", "entropy")},
        }
        self._write("words", "words", 0, {str(token): text for token, text in words.items()})
        self._write("index", "index", 0, index)
        page = Environment(loader=PackageLoader("opd_ext.inspection", "page"), autoescape=select_autoescape(["j2"]))
        html = page.get_template("index.html.j2").render(title=title)
        write_whole(self.folder.parent / "index.html", html)

    # ------------------------------------------------------------------ files

    def _flush(self) -> None:
        if not self._waiting:
            return
        number = len(self.starts)
        rows = [row for row, _, _ in self._waiting]
        self.starts.append(self.count - len(rows))
        students = [student for _, student, _ in self._waiting]
        common = {
            "lengths": [len(row["responses"]) for row in rows],
            "ids": whole_numbers([token for row in rows for token in row["responses"]]),
            "trained": whole_numbers([bit for row in rows for bit in row["loss_mask"]]),
            "forks": whole_numbers(np.concatenate([_forks(row, own) for row, own in zip(rows, students, strict=True)])),
            **_joined(students, ("log_prob", "entropy")),
            **_tops(students),
            "rows": [_shown(row) for row in rows],
        }
        self._write(f"rollouts_{number}", "rollouts", number, common)
        for name in self.methods:
            found = [signals[name] for _, _, signals in self._waiting]
            there = [_with_loss(values) for values in found if values is not None]
            names = [signal for signal in _SHOWN if there and signal in there[0]]
            self._write(
                f"{name}_{number}",
                name,
                number,
                {
                    "there": [int(values is not None) for values in found],
                    "taught": [int(_taught(values)) for values in found],
                    "prompts": [row["teacher_prompts"].get(name) for row in rows],
                    **_joined(there, names),
                    **(_tops(there) if there and "top" in there[0] else {}),
                },
            )
        texts = [f"{row['prompt_text'][-SEARCHED:]}\n{row['output'][:SEARCHED]}".lower() for row in rows]
        self._write(f"text_{number}", "text", number, texts)
        self._waiting = []

    def _write(self, file: str, kind: str, number: int, content: Any) -> None:
        write_whole(self.folder / f"{file}.js", f"page({as_script(kind)},{number},{as_script(content)});\n")

    # ------------------------------------------------------------------ statistics

    def _note(self, row: Row, student: Numbers, signals: dict[str, Numbers | None]) -> None:
        """Columns of the index; a rollout without a token or a teacher has 0 there."""
        surprise = -student["log_prob"]
        chosen = _forks(row, student)
        self.student["surprise"].append(surprise.astype(np.float32))
        self.student["entropy"].append(student["entropy"].astype(np.float32))
        self.tokens |= {*map(int, row["responses"]), *map(int, student["top"].ravel())}
        source = str(row.get("data_source") or "")
        question = " ".join(_question(row).split())
        self.labels.append([question[-SNIPPET:], source, str(row.get("index", "")), row["step"], row["sample"]])
        self._column("tokens", len(row["responses"]))
        self._column("trained", sum(row["loss_mask"]))
        self._column("score", row["score"])
        self._column("right", row["acc"] > 0.5)
        self._column("cut", bool(row.get("truncated")))
        self._column("surprise", _mean(surprise))
        self._column("peak", surprise.max() if len(surprise) else 0.0)
        self._column("entropy", _mean(student["entropy"]))
        for name in self.methods:
            values = signals[name]
            self._column(f"{name}:taught", _taught(values))
            found = _with_loss(values) if values is not None else {}
            push, distilled = found.get("push", np.zeros(0)), found.get("distilled", np.zeros(0, dtype=bool))
            self._column(f"{name}:divergence", _mean(found["divergence"][distilled]) if len(distilled) else 0.0)
            self._column(f"{name}:push", _mean(np.abs(push)))
            self._column(f"{name}:pushSum", np.abs(push).sum())
            self._column(f"{name}:onForks", np.abs(push[chosen]).sum() if len(push) else 0.0)
            self._column(f"{name}:overlap", _mean(found["overlap"][distilled]) if len(distilled) else 0.0)
            if found:
                self.tokens |= set(map(int, found["top"].ravel())) if "top" in found else set()
                self._collect(name, row, found)
            if self.rewarded[name]:
                reward, held = _held(row, found)
                self._column(f"{name}:reward", _mean(reward))
                self._column(f"{name}:rewarded", np.count_nonzero(reward))
                self._column(f"{name}:held", np.count_nonzero(held))

    def _column(self, name: str, value: Any) -> None:
        self.columns.setdefault(name, []).append(float(value))

    def _collect(self, name: str, row: Row, values: Numbers) -> None:
        for signal in [signal for signal in SIGNALS if signal in values]:
            kept = self.scales[name].setdefault(signal, [])
            kept.append(np.abs(values[signal]).astype(np.float32))
        totals = self.pushed[name]
        for token, push in zip(row["responses"], values["push"], strict=True):
            total = totals.setdefault(int(token), [0.0, 0.0, 0.0])
            total[0] += float(push)
            total[1] += abs(float(push))
            total[2] += 1

    def _scales(self, name: str) -> dict[str, float]:
        """Of each signal what 99 of 100 tokens stay below: where colours are full."""
        found = {}
        for signal, parts in self.scales[name].items():
            values = np.concatenate(parts)
            top = float(np.quantile(values, 0.99)) if len(values) else 0.0
            found[signal] = top or (float(values.max()) if len(values) else 0.0)
        return found

    def _stats(self, name: str) -> dict[str, float]:
        """Of all rollouts with a teacher: means, and the share of pushes on the student's least sure tokens.

        Of a policy term: the share of trained tokens with an advantage, and of these the clipped or capped ones.
        """
        found = {key: np.array(self.columns[f"{name}:{key}"]) for key in ("taught", "divergence", "overlap")}
        taught = found["taught"] > 0.5
        more = {}
        if self.rewarded[name]:
            rewarded, held = (np.sum(self.columns[f"{name}:{key}"]) for key in ("rewarded", "held"))
            trained = np.sum(self.columns["trained"])
            more = {"rewarded": float(rewarded / max(trained, 1)), "held": float(held / max(rewarded, 1))}
        total = float(np.sum(self.columns[f"{name}:pushSum"]))
        return {
            "taught": _mean(found["taught"]),
            "divergence": _mean(found["divergence"][taught]),
            "overlap": _mean(found["overlap"][taught]),
            "forks": float(np.sum(self.columns[f"{name}:onForks"])) / total if total else 0.0,
            "pushSum": total,
            **more,
        }

    def _student_scale(self, name: str) -> float:
        values = np.concatenate(self.student[name] or [np.zeros(1)])
        return float(np.quantile(values, 0.99)) or 1.0

    def _pushed(self, name: str) -> list[list[float]]:
        """The tokens with the largest sums of pushes: id, sum, sum of sizes, occurrences."""
        ordered = sorted(self.pushed[name].items(), key=lambda item: -item[1][1])
        return [[token, *totals] for token, totals in ordered[:_TOP]]


def as_script(content: Any) -> str:
    """JSON that is a JavaScript expression of ASCII, wherever it stands: no tag ends in it, no line separator."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def pack(values: np.ndarray) -> list[Any]:
    """[least, greatest, numbers in between as 16 bit, base64]."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64).ravel())
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    span = (high - low) or 1.0
    steps = np.rint((values - low) / span * 65535).astype("<u2")
    return [low, high, base64.b64encode(steps.tobytes()).decode()]


def whole_numbers(values: Sequence[int] | np.ndarray) -> list[Any]:
    """[bytes per number, the numbers, base64]."""
    numbers = np.asarray(values, dtype=np.int64).ravel()
    width = 2 if not len(numbers) or numbers.max() < 65536 else 4
    return [width, base64.b64encode(numbers.astype(f"<u{width}").tobytes()).decode()]


def _joined(parts: Sequence[Numbers], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: pack(np.concatenate([part[name] for part in parts] or [np.zeros(0)])) for name in names}


def _tops(parts: Sequence[Numbers]) -> dict[str, Any]:
    ids = [part["top"].ravel() for part in parts] or [np.zeros(0, dtype=np.int64)]
    chances = [part["top_p"].ravel() for part in parts] or [np.zeros(0)]
    width = parts[0]["top"].shape[-1] if parts else 0
    return {"shown": width, "top": whole_numbers(np.concatenate(ids)), "topP": pack(np.concatenate(chances))}


def _forks(row: Row, student: Numbers) -> np.ndarray:
    return forks(student["entropy"], row["loss_mask"], FORKS)


def _shown(row: Row) -> dict[str, Any]:
    names = ("uid", "sample", "index", "data_source", "step", "score", "acc", "truncated", "ground_truth", "feedback")
    plain = {name: row.get(name) for name in names}
    texts = {
        name: value if isinstance(value, (int, float, bool, type(None))) else str(value)
        for name, value in plain.items()
    }
    return {**texts, "prompt": row["prompt_text"]}


def _question(row: Row) -> str:
    """What tells one rollout from another in a list: the data set's question, else the end of the prompt."""
    question = (row.get("extra_info") or {}).get("question") if isinstance(row.get("extra_info"), Mapping) else None
    return str(question) if question else str(row["prompt_text"])


def _taught(values: Numbers | None) -> bool:
    return values is not None and bool(values.get("taught", True))


def _with_loss(values: Numbers) -> Numbers:
    return {**values, "loss": values["weight"] * values["per_token"]} if "weight" in values else values


def _held(row: Row, values: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Of the trained tokens: advantages, and whether one is there that a clip or cap acts on."""
    if not values:
        return np.zeros(0), np.zeros(0, dtype=bool)
    reward, gate, ratio = (values[name][np.array(row["loss_mask"]) > 0] for name in ("reward", "gate", "ratio"))
    return reward, (reward != 0) & (np.abs(gate - ratio) > _HELD * np.maximum(ratio, _HELD))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
