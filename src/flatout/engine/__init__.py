"""Serving: requests -> scheduler -> pages of the KV cache -> runner -> text. Works with any
`runner.Runner`."""
