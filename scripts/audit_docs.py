"""Generate the page of audit rules from the rules.

python scripts/audit_docs.py        print it; scripts/generate_docs.py writes and checks it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchparams.lint.findings import Audit, AuditRule

HEAD = """\
# The audit

`torchparams.audit(model, optimizer=None)` is a linter for parameters. It checks a live network, and its optimizer and \
gradients if there are any. Each finding says what is wrong, why it matters, and how to fix it. An audit changes \
nothing, and the network's own code does not run.

```python
import torch
from torch import nn

import torchparams as tp
```

```python
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.ndim >= 2])

found = tp.audit(model, optimizer)
assert [finding.id for finding in found] == ["O101"]
assert found.exit_code == 1
print(found)  # or found.to_json(); found.errors, found.warnings and found.notes are parts of it
```

**Severities.** An *error* is a mistake. A *warning* is almost always one. A *note* is legal but rarely intended. The \
exit status of `torchparams audit` (and `exit_code`) is 1 if there is an error or a warning, and 0 otherwise, even \
with notes.

**Choosing rules** works as in ruff: `select=` and `ignore=` (`--select`, `--ignore`) accept ids, prefixes of ids \
(`M`, `O1`) or names. The longer prefix wins.

**Suppression** is by rule and selector: `suppress={"M303": "head.**"}` (`--suppress 'M303=head.**'`) excludes these \
parameters from that rule. A selector that matches neither a parameter nor a name in a finding is an error.

**From the command line**, `torchparams audit mypackage.models:build` calls `build()` and audits its result. With \
`--meta` the model is built without memory for its values, and the rules about values cannot run.

**Cost.** Every value is read once, at the speed of memory. The rest is linear in the number of modules and \
parameters, except for sorting addresses.

## The rules

The tests run the examples: the rule has a finding in its first example, and none in the second.
"""


def audit_page() -> str:
    """`docs/audit.md`."""
    from torchparams.lint.audit import RULES

    lines = [HEAD]
    lines.append("| id | name | severity | finds |\n|---|---|---|---|")
    for rule in RULES:
        anchor = f"{rule.id}-{rule.name}".lower()
        lines.append(f"| [{rule.id}](#{anchor}) | {rule.name} | {rule.severity} | {rule.title} |")
    lines += ["", *map(_section, RULES)]
    return "\n".join(lines)


def _section(rule: AuditRule) -> str:
    (finding, *_) = (finding for finding in run(rule.failing, rule.ranks) if finding.id == rule.id)
    kind = "python" if rule.ranks == 1 else "py"  # what is run on several ranks is run by the tests of the audit
    paragraphs = [
        f"### {rule.id} {rule.name}",
        f"*{rule.severity}.* {rule.title}. Why it matters: {rule.why}.",
        *([rule.background] if rule.background else []),
        *([f"The examples run on {rule.ranks} ranks."] if rule.ranks > 1 else []),
        f"```{kind}\n{rule.failing}```",
        f"```text\n{finding}\n```",
        f"Without it:\n\n```{kind}\n{rule.passing}```",
    ]
    return "\n\n".join(paragraphs) + "\n"


def run(example: str, ranks: int = 1) -> Audit:
    """The audit of what an example makes; on the first of several ranks."""
    if ranks > 1:
        from ranks import on_ranks

        found: Audit = on_ranks(ranks, run, example)
        return found
    import torch
    from torch import nn

    import torchparams as tp

    torch.manual_seed(0)
    made: dict[str, Any] = {"torch": torch, "nn": nn, "tp": tp}
    exec(compile(example, "<example>", "exec"), made)
    return tp.audit(made["model"], made.get("optimizer"))


if __name__ == "__main__":
    print(audit_page())
