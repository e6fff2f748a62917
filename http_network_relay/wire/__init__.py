"""docs/protocol.md as code: names, numbers, codes, controls, frames. No I/O."""
