"""Report of what a conversion does or would do: a sentence, a table, and what it can't reach."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What happens to one module.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        was: a description of the module.
        becomes: a description of its replacement; None if it is left alone.
        why: why it is left alone, or how the replacement differs from what was requested.
        kind: why it is left alone, in a word or two that are the same for similar modules.
    """

    name: str
    was: str
    becomes: str | None = None
    why: str = ""
    kind: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion does with every convolution that sees more than one pixel. Prints as a sentence and a table.

    Attributes:
        entries: one per module, in the order of ``model.named_modules()``.
        not_reached: attributes outside the module tree (lists, tuples, dicts, bound methods) that hold a convolution,
            and what they hold: the conversion does not replace it there.
        notes: what else to know about the converted network.
    """

    entries: tuple[Entry, ...]
    not_reached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[Entry, ...]:
        """Those that become attention."""
        return tuple(entry for entry in self.entries if entry.becomes is not None)

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        """Those that stay as they are."""
        return tuple(entry for entry in self.entries if entry.becomes is None)

    @property
    def summary(self) -> str:
        """A one-sentence summary, and which argument would convert more."""
        left = Counter(entry.kind for entry in self.left_alone)
        if not self.entries:
            return "No convolution larger than 1x1 was found."
        if len(left) == 1 and not self.converted:
            count, kind = len(self.left_alone), next(iter(left))
            found = f"The only one is left alone: {kind}" if count == 1 else f"All {count} are left alone: {kind}"
        else:
            found = f"{len(self.converted)} converted to attention, {len(self.left_alone)} left alone"
            if left:
                found += f" ({', '.join(f'{count} {kind}' for kind, count in left.items())})"
        hints = []
        if grouped := [kind for kind in left if kind in ("depthwise", "grouped")]:
            hints.append(
                f"grouped=True would convert the {' and '.join(grouped)} ones to attention of all channels, "
                "keep_function=True keeps them light"
            )
        if "stem" in left and not self.converted:
            hints.append("stem=True would convert the stem")
        return "; ".join([found, *hints]) + "."

    @property
    def few(self) -> bool:
        """Whether fewer than a third of the requested ``nn.Conv2d`` are converted."""
        kinds = "stem", "not asked for", "transposed", "1-dimensional", "3-dimensional", "with a kernel of its own"
        refused = [entry for entry in self.left_alone if entry.kind not in kinds]
        return 2 * len(self.converted) < len(refused)

    def __str__(self) -> str:
        rows = [
            (e.name or "(the model)", e.was, (e.becomes or "left alone") + (f" ({e.why})" if e.why else ""))
            for e in self.entries
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [self.summary]
        lines += [f"{name:<{widths[0]}}  {was:<{widths[1]}}  {then}" for name, was, then in rows]
        lines += [f"Not reached: {text}" for text in self.not_reached]
        return "\n".join([*lines, *self.notes])
