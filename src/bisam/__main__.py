"""`python -m bisam`: the command `bisam`."""

from bisam.experiments import main

if __name__ == "__main__":
    main()
