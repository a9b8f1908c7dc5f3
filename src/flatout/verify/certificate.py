"""The certificate: a one-sided bound on the loss of an optimised model, with all that is needed to check it.

    passed          the upper bound U of the loss a token is below log(1 + margin), at level 1 - alpha_k
    failed          the lower bound, at the same level, is not below it: the loss is larger than the margin
    cannot_decide   neither: the text is too short or the loss too close to the margin

The claim is about text like the one that was judged. `recompute` derives every number and the verdict again
from the stored clusters; whoever holds both models can score them again as well (`examination.rerun`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flatout._version import __version__
from flatout.core.files import read_json_object
from flatout.core.types import to_json
from flatout.errors import ConfigError, EvidenceError
from flatout.verify.quality import ClusterLoss, Divergence, arrays, loss_by_domain, perplexities
from flatout.verify.statistics import (
    FEWEST_CLUSTERS,
    Bound,
    alpha_k,
    check_clusters,
    cluster_t_upper,
    ratio_bound,
)

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models. source: path or name it was opened by; runner: what computed its scores;
    derived_from: hash of the original that an artifact says it was made from, "" for others."""

    source: str
    sha256: str
    recipe: str
    runner: str
    derived_from: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What was judged. source: "shipped" or a path; sha256: of the whole hold-out; clusters_sha256: of the
    tokens scored; block: most tokens of a cluster; available: clusters that the hold-out holds."""

    source: str
    sha256: str
    clusters_sha256: str
    tokenizer_sha256: str
    block: int
    available: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Losses are natural logarithms a token; `loss` and `loss_upper` the same as a fraction of the
    perplexity."""

    verdict: str
    reason: str
    margin: float
    alpha: float
    k: int
    alpha_k: float
    delta: float
    upper: float
    lower: float
    loss: float
    loss_upper: float
    standard_error: float
    method: str
    perplexity_original: float
    perplexity_optimised: float
    tokens: int
    worst_cluster: str
    worst_domain: str
    worst_domain_loss: float
    original: Side
    optimised: Side
    text: Text
    code_version: str
    hardware: str
    created: str
    divergence: Divergence | None
    notes: tuple[str, ...]
    clusters: tuple[ClusterLoss, ...]
    version: int = VERSION

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def certify(
    losses: Sequence[ClusterLoss],
    *,
    original: Side,
    optimised: Side,
    text: Text,
    k: int,
    margin: float = 0.01,
    alpha: float = 0.05,
    hardware: str = "",
    divergence: Divergence | None = None,
    notes: Sequence[str] = (),
    created: str = "",
    code_version: str = __version__,
) -> Certificate:
    """The certificate of paired losses on the k-th opening of a hold-out.

    Raises EvidenceError for losses that are not finite, swapped models or a worn-out hold-out, ConfigError
    for a margin or an error level outside (0, 1) and (0, 0.5).
    """
    check_levels(margin, alpha)
    refuse_swapped(original, optimised)
    level = alpha_k(k, alpha)
    bound, lower, verdict, reason = _decide(losses, margin, level)
    before, after = perplexities(losses)
    domains = loss_by_domain(losses)
    worst_domain = next(iter(domains))
    limit = math.log1p(margin)
    remarks = list(notes)
    if bound.upper < -limit:
        remarks.append(
            "the optimised model predicts this text better than the original: are the two swapped?"
        )
    if bound.upper < limit and _exceeds(losses, worst_domain, limit, alpha / len(domains)):
        remarks.append(f"the mean is inside the margin, the domain {worst_domain} alone is not")
    return Certificate(
        verdict=verdict,
        reason=reason,
        margin=margin,
        alpha=alpha,
        k=k,
        alpha_k=level,
        delta=bound.delta,
        upper=bound.upper,
        lower=lower,
        loss=_expm1(bound.delta),
        loss_upper=_expm1(bound.upper),
        standard_error=bound.standard_error,
        method=bound.method,
        perplexity_original=before,
        perplexity_optimised=after,
        tokens=sum(cluster.tokens for cluster in losses),
        worst_cluster=max(losses, key=lambda cluster: cluster.loss / cluster.tokens).id,
        worst_domain=worst_domain,
        worst_domain_loss=_expm1(domains[worst_domain]),
        original=original,
        optimised=optimised,
        text=text,
        code_version=code_version,
        hardware=hardware,
        created=created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        divergence=divergence,
        notes=tuple(remarks),
        clusters=tuple(losses),
    )


def check_levels(margin: float, alpha: float) -> None:
    """Raise ConfigError for a margin or an error level that makes no sense."""
    if not 0 < margin < 1:
        raise ConfigError("the margin lies between 0 and 1 (0 and 100 %)", str(margin), "0.01")
    if not 0 < alpha < 0.5:
        raise ConfigError("the error level lies between 0 and 0.5", str(alpha), "0.05")


def refuse_swapped(original: Side, optimised: Side) -> None:
    """Raise EvidenceError when the model that is called the original was made from the other one."""
    if original.derived_from and original.derived_from == optimised.sha256 != original.sha256:
        raise EvidenceError(
            "the optimised model comes first, the original after --against",
            f"{original.source} was made from {optimised.source}",
            "swap the two",
        )


def _decide(losses: Sequence[ClusterLoss], margin: float, level: float) -> tuple[Bound, float, str, str]:
    """(bound, lower bound, verdict, reason); a single cluster has no spread, so its bounds are infinite."""
    D, n = arrays(losses)
    check_clusters(D, n)
    limit = math.log1p(margin)
    if len(losses) < FEWEST_CLUSTERS:
        delta = float(D.sum() / n.sum())
        bound = Bound(delta=delta, upper=math.inf, standard_error=math.inf, method="none")
        reason = (
            f"cannot decide with this text: {len(losses)} clusters, at least {FEWEST_CLUSTERS} are needed"
        )
        return bound, -math.inf, "cannot_decide", reason
    bound = ratio_bound(D, n, level)
    lower = -ratio_bound(-D, n, level).upper
    most = f"{_expm1(bound.upper):.2%}" if math.isfinite(bound.upper) else "none: too few passages differ"
    shown = f"upper bound {most}, margin {margin:.2%}"
    if bound.upper < limit:
        return bound, lower, "passed", shown
    if lower >= limit:
        return bound, lower, "failed", f"the loss is at least {_expm1(lower):.2%}, margin {margin:.2%}"
    return bound, lower, "cannot_decide", f"cannot decide with this text: {shown}"


def _exceeds(losses: Sequence[ClusterLoss], domain: str, limit: float, alpha: float) -> bool:
    """Whether one domain's loss is above `limit` beyond the noise of its few clusters (at least 5)."""
    D, n = arrays([cluster for cluster in losses if cluster.domain == domain])
    return len(D) >= 5 and -float(cluster_t_upper(-D, n, alpha)) > limit


def _expm1(value: float) -> float:
    """exp(value) - 1, infinite where that overflows."""
    return math.expm1(value) if value < 700 else math.inf


def certificate_from_json(value: Any) -> Certificate:
    """The certificate in a JSON object, checked against its own clusters. It may also stand under the key
    "certificate" (flatout.json) or "quality" (what `flatout verify --json` prints).

    Raises EvidenceError when keys or types are wrong, or when a number or the verdict does not follow from
    the clusters.
    """
    for key in ("certificate", "quality"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    parts = {"original": Side, "optimised": Side, "text": Text}
    rows = _object(value, Certificate, "certificate")
    if rows["version"] != VERSION:
        raise EvidenceError(f"a certificate is of version {VERSION}", str(rows["version"]), "a newer flatout")
    built: dict[str, Any] = {name: _build(rows[name], kind, name) for name, kind in parts.items()}
    if not isinstance(rows["clusters"], list) or not rows["clusters"]:
        raise EvidenceError("a certificate lists its clusters", "none", "verify again")
    losses = [_build(row, ClusterLoss, f"clusters[{i}]") for i, row in enumerate(rows["clusters"])]
    if any(cluster.tokens < 1 for cluster in losses):
        raise EvidenceError("every cluster holds a scored token", "one does not", "verify again")
    divergence = None if rows["divergence"] is None else _build(rows["divergence"], Divergence, "divergence")
    notes = rows["notes"]
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise EvidenceError("notes are a list of strings", str(notes)[:80], "verify again")
    scalars = _scalars(
        {k: v for k, v in rows.items() if k not in (*parts, "clusters", "divergence", "notes")}
    )
    certificate = certify(
        losses,
        **built,
        k=scalars["k"],
        margin=scalars["margin"],
        alpha=scalars["alpha"],
        hardware=scalars["hardware"],
        divergence=divergence,
        created=scalars["created"],
        code_version=scalars["code_version"],
    )
    for name, stored in scalars.items():
        own = getattr(certificate, name)
        if not (
            math.isclose(own, stored, rel_tol=1e-9, abs_tol=1e-12)
            if isinstance(own, float)
            else own == stored
        ):
            raise EvidenceError(
                f"{name} must follow from the clusters", f"{stored} stored, {own} computed", "verify again"
            )
    extra = tuple(note for note in notes if note not in certificate.notes)
    return replace(certificate, notes=(*extra, *certificate.notes))


def recompute(path: str | Path) -> Certificate:
    """The certificate in a file (CERT.json, or an artifact's flatout.json or folder), derived again from
    its clusters.

    Raises EvidenceError when it does not hold what its clusters say, ModelFileError when it cannot be read.
    """
    path = Path(path)
    return certificate_from_json(read_json_object(path / "flatout.json" if path.is_dir() else path))


def certificate_to_json(certificate: Certificate) -> dict[str, Any]:
    """Plain JSON values; infinite bounds become null."""
    value = to_json(certificate)
    if not isinstance(value, dict):
        raise TypeError("a certificate is an object")
    return value


_INFINITE = {
    "upper": math.inf,
    "lower": -math.inf,
    "loss": math.inf,
    "loss_upper": math.inf,
    "standard_error": math.inf,
    "worst_domain_loss": math.inf,
    "perplexity_original": math.inf,
    "perplexity_optimised": math.inf,
}
"""What null stands for: JSON has no infinity."""


def _object(value: Any, kind: type, where: str) -> dict[str, Any]:
    """`value` if it is an object with exactly the fields of `kind`."""
    expected = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or set(value) != expected:
        wrong = sorted(set(value) ^ expected) if isinstance(value, dict) else [type(value).__name__]
        raise EvidenceError(
            f"{where} has the fields of a {kind.__name__}", ", ".join(wrong)[:120], "verify again"
        )
    return value


def _scalars(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers as the certificate holds them, null as the infinity it was."""
    values = {
        name: _INFINITE[name] if value is None and name in _INFINITE else value for name, value in row.items()
    }
    for name, value in values.items():
        kind = next(field.type for field in fields(Certificate) if field.name == name)
        _check_type(name, value, str(kind))
    return values


def _build(value: Any, kind: type, where: str) -> Any:
    row = _object(value, kind, where)
    for field in fields(kind):
        _check_type(f"{where}.{field.name}", row[field.name], str(field.type))
    return kind(**row)


def _check_type(where: str, value: Any, kind: str) -> None:
    sound = {
        "int": isinstance(value, int),
        "float": isinstance(value, int | float),
        "str": isinstance(value, str),
    }[kind]
    if not sound or isinstance(value, bool):
        raise EvidenceError(f"{where} must be of type {kind}", repr(value)[:80], "verify again")
