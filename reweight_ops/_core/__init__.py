"""How the package works. What a user types stands one folder up; nobody outside imports from here."""
