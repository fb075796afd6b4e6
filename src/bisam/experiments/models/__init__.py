"""Models: networks by name.

build.py     a model, its tokenizer and its channel statistics by name, from us, torchvision, timm or Hugging Face
files.py     a trained model in files of torch, safetensors, ONNX, timm and Hugging Face
networks.py  our networks for small images
"""
