"""The networks: classifiers for small and large images, U-Net and SegNet, and named layers of any of them."""

from .autoencoders import segnet, unet, unpool
from .classifiers import classifier, resnet18, small_cnn, vgg0, vgg11
from .layers import Normalize, features, folded, layer_names, seeded
from .pretrained import torchvision_classifier

__all__ = ["Normalize", "classifier", "features", "folded", "layer_names", "resnet18", "seeded", "segnet", "small_cnn"]
__all__ += ["torchvision_classifier", "unet", "unpool", "vgg0", "vgg11"]
