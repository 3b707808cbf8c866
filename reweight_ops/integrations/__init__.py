"""Other libraries' trainers on our ops. Each module imports its library, so the package
itself imports none of them.
"""
