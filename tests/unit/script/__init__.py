"""The proxy command's own part: what stands outside its shared block."""
