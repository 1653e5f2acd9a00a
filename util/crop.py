import math

import torch
from torchvision import transforms
from torchvision.transforms import functional as F


class RandomResizedCrop(transforms.RandomResizedCrop):
    """RandomResizedCrop that draws its box once, without torchvision's ten tries: linear probing's (MAE, appendix A.1)."""

    @staticmethod
    def get_params(img, scale, ratio):
        """(top, left, height, width) in pixels; the box is cut to the image."""
        _, height, width = F.get_dimensions(img)
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(ratio[0]), math.log(ratio[1])).item())
        w = min(max(round(math.sqrt(area * aspect)), 1), width)  # a picture of few pixels could round to none
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        top = torch.randint(0, height - h + 1, size=(1,)).item()
        left = torch.randint(0, width - w + 1, size=(1,)).item()
        return top, left, h, w
