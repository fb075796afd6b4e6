"""Inference: trained models on data of a run, on other data, and on files of a user.

loaded.py     a trained model, from a run folder, an exported folder, or a file of weights
images.py     images of other data, prepared as the test images of a run
evaluate.py   scores, loss, calibration, margins, corruptions and test-time augmentation on a split
predict.py    the most probable classes of image files and of texts

    model = load("runs/train/sam-noise-0-1f0c22e9/seed-0", Machine())
    evaluate(model, Machine()).scores["accuracy"]
"""
