"""Resolution of a call's arguments into what the engine runs."""
