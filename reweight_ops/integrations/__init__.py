"""Other libraries' trainers on our ops. Each module imports its library, so none is imported by the package itself."""
