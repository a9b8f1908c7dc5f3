"""One file a command: parse, build a config, call, print. Nothing else lives here."""
