"""The implementation of the package. The folder above has the public names, and users
do not import from here.
"""
