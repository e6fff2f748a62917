"""Mutants of the project: small faults, one per rule of the design, each with its tests.

Each TOML file here holds the mutants of one subject, as `[[mutant]]` tables with five keys:

- `rule`: the rule of the design that the mutant breaks;
- `file`: the patched file, relative to the root of the project;
- `old`: text that stands exactly once in `file`;
- `new`: the text in place of `old`;
- `tests`: tests that pass in the project, and fail with the patch.

TOML drops a line end directly behind opening quotes. Texts of several lines therefore begin on
the line below the quotes, and a line end before the closing quotes belongs to the text.

`python -m tests.mutants --check` compares the mutants with the project, without any tests.
`python -m tests.mutants` applies the mutants and runs their tests.
"""
