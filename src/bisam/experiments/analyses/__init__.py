"""Analyses: what `bisam.analysis` measures of finished runs, kept in `analysis.json` in their folders.

run.py        `analyse` computes what is not there yet, and writes it
catalogue.py  the analyses by name: what each measures, its columns in reports, its figure
settings.py   the settings of an analysis
subject.py    the model and the examples that are analysed
file.py       the file: what an entry of it holds, and how it is read and written
figures.py    the figures of an entry

    from bisam.experiments.analyses.run import analyse

    analyse(Path("runs/digits/sam-noise-0-1f0c22e9/seed-0"), ["sharpness", "flips"], Settings(rho=(0.05, 0.1)))
"""
