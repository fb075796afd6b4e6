"""Models: networks by name.

build.py     a model, its tokenizer and its channel statistics by name, from us, torchvision, timm or Hugging Face
initial.py   the weights that a model starts with, of a file or of a finished run
files.py     a trained model in files of torch, safetensors, ONNX, timm and Hugging Face
card.py      the model card of an exported folder
hub.py       an exported folder on the Hugging Face hub
networks.py  our networks for small images
gpt.py       our network for tokens
"""
