"""Models: networks by name.

build.py     a model, its tokenizer and its channel statistics by name, from us, torchvision, timm or Hugging Face
initial.py   the weights that a model starts with, of a file or of a finished run
files.py     a trained model in files of torch, safetensors, ONNX, timm and Hugging Face
networks.py  our networks for small images
"""
