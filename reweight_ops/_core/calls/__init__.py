"""How a call's arguments become what the engine runs."""
