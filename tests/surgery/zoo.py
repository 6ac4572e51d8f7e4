"""Small networks from public definitions, written the way an ordinary user of PyTorch writes them.

Every function returns ``(model, args)`` with a batch of two. Weights come from one fixed seed; vectors (biases, scales)
and running statistics are moved off their initial zeros and ones, so that an index mistake in any of them shows.
"""

# Modules carry no annotations here, as in most users' code, so that types inferred from defaults are too narrow.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

Built = tuple[nn.Module, tuple]
ARCHITECTURES: dict[str, Callable[[], Built]] = {}


def architecture(function: Callable[[], Built]) -> Callable[[], Built]:
    """Registers a network under the name of its function and makes its weights and inputs reproducible."""

    @functools.wraps(function)
    def build() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args = function()
            stir(model)
        return model, args

    ARCHITECTURES[function.__name__] = build
    return build


def stir(model: nn.Module) -> None:
    """Adds noise to all vectors and running statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(0.75 + 0.5 * torch.rand_like(buffer))


def images(size=16, channels=3):
    return (torch.randn(2, channels, size, size),)


def tokens(length=8, vocabulary=40):
    return (torch.randint(0, vocabulary, (2, length)),)


def conv_bn(c_in, c_out, k=3, s=1, groups=1, act=nn.ReLU):
    layers = [nn.Conv2d(c_in, c_out, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, act()) if act is not None else nn.Sequential(*layers)


# ---- plain and residual convolutional networks ----------------------------------------------------------------------


class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for width in (16, "M", 32, 32, "M", 48, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            c_in = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(48 * 2 * 2, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))

    def forward(self, x):
        x = self.features(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


@architecture
def vgg():
    return VGG(), images()


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


class OptionABlock(BasicBlock):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__(c_in, c_out, stride)
        self.downsample = None
        self.stride = stride
        self.extra = c_out - c_in

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in, width, stride=1, groups=1):
        super().__init__()
        c_out = width * self.expansion
        self.conv1 = conv_bn(c_in, width, 1)
        self.conv2 = conv_bn(width, width, 3, stride, groups=groups)
        self.conv3 = conv_bn(width, c_out, 1, act=None)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = conv_bn(c_in, c_out, 1, stride, act=None)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv3(self.conv2(self.conv1(x)))
        return self.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    def __init__(self, c_in, c_out, stride=1, dropout=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))
        return out + shortcut


class ResNet(nn.Module):
    def __init__(self, stem, blocks, width, final_bn=False):
        super().__init__()
        self.stem = stem
        self.layers = nn.Sequential(*blocks)
        self.bn = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()) if final_bn else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.bn(self.layers(self.stem(x)))
        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        return self.fc(x)


@architecture
def resnet_basic():
    blocks = [BasicBlock(16, 16), BasicBlock(16, 24, 2), BasicBlock(24, 24), BasicBlock(24, 32, 2)]
    return ResNet(conv_bn(3, 16), blocks, 32), images()


@architecture
def resnet_option_a():
    blocks = [OptionABlock(16, 16), OptionABlock(16, 32, 2), OptionABlock(32, 32), OptionABlock(32, 48, 2)]
    return ResNet(conv_bn(3, 16), blocks, 48), images()


@architecture
def resnet_bottleneck():
    blocks = [Bottleneck(16, 8), Bottleneck(32, 8), Bottleneck(32, 16, 2), Bottleneck(64, 16)]
    return ResNet(conv_bn(3, 16), blocks, 64), images()


@architecture
def resnet_preact():
    blocks = [PreActBlock(16, 16), PreActBlock(16, 32, 2), PreActBlock(32, 32)]
    return ResNet(nn.Conv2d(3, 16, 3, 1, 1, bias=False), blocks, 32, final_bn=True), images()


@architecture
def resnext():
    blocks = [Bottleneck(16, 16, groups=8), Bottleneck(64, 16, groups=8), Bottleneck(64, 24, 2, groups=8)]
    return ResNet(conv_bn(3, 16), blocks, 96), images()


@architecture
def wide_resnet():
    blocks = [PreActBlock(8, 32, dropout=0.3), PreActBlock(32, 48, 2, 0.3), PreActBlock(48, 48, dropout=0.3)]
    return ResNet(nn.Conv2d(3, 8, 3, 1, 1, bias=False), blocks, 48, final_bn=True), images()


class DenseLayer(nn.Module):
    def __init__(self, c_in, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out)))
        return torch.cat([x, out], 1)


class DenseNet(nn.Module):
    def __init__(self, growth=8):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = nn.Sequential(*[DenseLayer(16 + i * growth, growth) for i in range(3)])
        self.transition = nn.Sequential(
            nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1, bias=False), nn.AvgPool2d(2)
        )
        self.block2 = nn.Sequential(*[DenseLayer(20 + i * growth, growth) for i in range(3)])
        self.norm = nn.BatchNorm2d(44)
        self.classifier = nn.Linear(44, 10)

    def forward(self, x):
        x = self.block2(self.transition(self.block1(self.conv0(x))))
        x = F.relu(self.norm(x))
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


@architecture
def densenet():
    return DenseNet(), images()


class InceptionBlock(nn.Module):
    def __init__(self, c_in):
        super().__init__()
        self.b1 = conv_bn(c_in, 16, 1)
        self.b3 = nn.Sequential(conv_bn(c_in, 12, 1), conv_bn(12, 24))
        self.b5 = nn.Sequential(conv_bn(c_in, 6, 1), conv_bn(6, 8, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(c_in, 8, 1))

    def forward(self, x):
        return torch.cat((self.b1(x), self.b3(x), self.b5(x), self.pool(x)), dim=1)


@architecture
def inception():
    model = nn.Sequential(conv_bn(3, 16), InceptionBlock(16), nn.MaxPool2d(2), InceptionBlock(56),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(56, 10))  # fmt: skip
    return model, images()


class Fire(nn.Module):
    def __init__(self, c_in, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


@architecture
def squeezenet():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), Fire(16, 8, 16), Fire(32, 8, 24),
                          nn.Conv2d(48, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
    return model, images()


@architecture
def network_in_network():
    def nin(c_in, c_out, k):
        return [nn.Conv2d(c_in, c_out, k, padding=k // 2), nn.ReLU(), nn.Conv2d(c_out, c_out, 1), nn.ReLU()]

    model = nn.Sequential(*nin(3, 24, 5), nn.MaxPool2d(2), *nin(24, 32, 3), nn.AvgPool2d(2), *nin(32, 10, 3),
                          nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())  # fmt: skip
    return model, images()


class RepVGGBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = conv_bn(width, width, 3, act=None)
        self.point = conv_bn(width, width, 1, act=None)
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


@architecture
def repvgg():
    return ResNet(conv_bn(3, 16), [RepVGGBlock(16), conv_bn(16, 24, 3, 2), RepVGGBlock(24)], 24), images()


class Res2Block(nn.Module):
    def __init__(self, width, scale=4):
        super().__init__()
        self.scale = scale
        self.width = width // scale
        self.conv1 = conv_bn(width, width, 1)
        self.convs = nn.ModuleList([conv_bn(self.width, self.width) for _ in range(scale - 1)])
        self.conv3 = conv_bn(width, width, 1, act=None)

    def forward(self, x):
        parts = torch.split(self.conv1(x), self.width, 1)
        outs = []
        for i, conv in enumerate(self.convs):
            y = parts[i] if i == 0 else y + parts[i]  # noqa: F821
            y = conv(y)
            outs.append(y)
        outs.append(parts[self.scale - 1])
        return F.relu(self.conv3(torch.cat(outs, 1)) + x)


@architecture
def res2net():
    return ResNet(conv_bn(3, 24), [Res2Block(24), conv_bn(24, 32, 3, 2), Res2Block(32)], 32), images()


class CBAM(nn.Module):
    def __init__(self, channels, reduction=4):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels // reduction), nn.ReLU(), nn.Linear(channels // reduction, channels)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        b, c, _, _ = x.size()
        gate = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * torch.sigmoid(gate).view(b, c, 1, 1)
        maps = torch.cat([x.mean(1, keepdim=True), x.max(dim=1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.spatial(maps))


@architecture
def cbam():
    return ResNet(conv_bn(3, 16), [BasicBlock(16, 24), CBAM(24), BasicBlock(24, 24), CBAM(24)], 24), images()


# ---- mobile networks ------------------------------------------------------------------------------------------------


class ShuffleV1Unit(nn.Module):
    def __init__(self, channels, groups=4):
        super().__init__()
        self.groups = groups
        mid = channels // 2
        self.gconv1 = conv_bn(channels, mid, 1, groups=groups)
        self.depthwise = conv_bn(mid, mid, 3, groups=mid, act=None)
        self.gconv2 = conv_bn(mid, channels, 1, groups=groups, act=None)

    def shuffle(self, x):
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w)
        x = x.transpose(1, 2).contiguous()
        return x.view(n, c, h, w)

    def forward(self, x):
        out = self.shuffle(self.gconv1(x))
        return F.relu(x + self.gconv2(self.depthwise(out)))


@architecture
def shufflenet_v1():
    blocks = [ShuffleV1Unit(32), ShuffleV1Unit(32), conv_bn(32, 48, 3, 2), ShuffleV1Unit(48)]
    return ResNet(conv_bn(3, 32), blocks, 48), images()


def channel_shuffle(x, groups):
    batch_size, channels, height, width = x.size()
    x = x.view(batch_size, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch_size, channels, height, width)


class ShuffleV2Unit(nn.Module):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.stride = stride
        half = c_out // 2
        if stride > 1:
            self.branch1 = nn.Sequential(conv_bn(c_in, c_in, 3, stride, c_in, None), conv_bn(c_in, half, 1))
        self.branch2 = nn.Sequential(
            conv_bn(c_in if stride > 1 else half, half, 1), conv_bn(half, half, 3, stride, half, None),
            conv_bn(half, half, 1),
        )  # fmt: skip

    def forward(self, x):
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


@architecture
def shufflenet_v2():
    blocks = [ShuffleV2Unit(16, 32, 2), ShuffleV2Unit(32, 32), ShuffleV2Unit(32, 48, 2), ShuffleV2Unit(48, 48)]
    return ResNet(conv_bn(3, 16), blocks, 48), images()


@architecture
def mobilenet_v1():
    def separable(c_in, c_out, stride):
        return [conv_bn(c_in, c_in, 3, stride, groups=c_in), conv_bn(c_in, c_out, 1)]

    blocks = [*separable(16, 24, 1), *separable(24, 32, 2), *separable(32, 48, 1)]
    return ResNet(conv_bn(3, 16), blocks, 48), images()


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeeze, gate):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = nn.SiLU() if isinstance(gate, nn.Sigmoid) else nn.ReLU()
        self.gate = gate

    def forward(self, x):
        scale = self.gate(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


class InvertedResidual(nn.Module):
    def __init__(self, c_in, c_out, stride, expand, act=nn.ReLU6, gate=None):
        super().__init__()
        hidden = c_in * expand
        layers = [conv_bn(c_in, hidden, 1, act=act), conv_bn(hidden, hidden, 3, stride, hidden, act)]
        if gate is not None:
            layers.append(SqueezeExcite(hidden, hidden // 4, gate))
        layers.append(conv_bn(hidden, c_out, 1, act=None))
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


@architecture
def mobilenet_v2():
    blocks = [InvertedResidual(16, 16, 1, 2), InvertedResidual(16, 24, 2, 4), InvertedResidual(24, 24, 1, 4),
              conv_bn(24, 48, 1, act=nn.ReLU6)]  # fmt: skip
    return ResNet(conv_bn(3, 16, act=nn.ReLU6), blocks, 48), images()


@architecture
def mobilenet_v3():
    act, gate = nn.Hardswish, nn.Hardsigmoid()
    blocks = [InvertedResidual(16, 16, 1, 2, act, gate), InvertedResidual(16, 24, 2, 4, act, gate),
              InvertedResidual(24, 24, 1, 4, act, gate), conv_bn(24, 48, 1, act=act)]  # fmt: skip
    return ResNet(conv_bn(3, 16, act=act), blocks, 48), images()


@architecture
def efficientnet():
    act, gate = nn.SiLU, nn.Sigmoid()
    blocks = [InvertedResidual(16, 16, 1, 2, act, gate), InvertedResidual(16, 24, 2, 6, act, gate),
              InvertedResidual(24, 24, 1, 6, act, gate), conv_bn(24, 48, 1, act=act)]  # fmt: skip
    return ResNet(conv_bn(3, 16, act=act), blocks, 48), images()


class GhostModule(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.out_channels = c_out
        primary = math.ceil(c_out / 2)
        self.primary_conv = conv_bn(c_in, primary, 1)
        self.cheap_operation = conv_bn(primary, primary, 3, groups=primary)

    def forward(self, x):
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.out_channels, :, :]


@architecture
def ghostnet():
    blocks = [GhostModule(16, 24), nn.MaxPool2d(2), GhostModule(24, 33), GhostModule(33, 32)]
    return ResNet(conv_bn(3, 16), blocks, 32), images()


class SKUnit(nn.Module):
    def __init__(self, channels, branches=2, reduced=8):
        super().__init__()
        self.M = branches
        self.features = channels
        self.convs = nn.ModuleList()
        for i in range(branches):
            conv = nn.Conv2d(channels, channels, 3, padding=1 + i, dilation=1 + i, groups=4, bias=False)
            self.convs.append(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()))
        self.fc = nn.Sequential(nn.Linear(channels, reduced), nn.ReLU())
        self.fcs = nn.ModuleList([nn.Linear(reduced, channels) for _ in range(branches)])

    def forward(self, x):
        feats = torch.cat([conv(x) for conv in self.convs], dim=1)
        feats = feats.view(x.shape[0], self.M, self.features, feats.shape[2], feats.shape[3])
        pooled = torch.sum(feats, dim=1).mean((2, 3))
        z = self.fc(pooled)
        vectors = torch.cat([fc(z) for fc in self.fcs], dim=1)
        vectors = vectors.view(x.shape[0], self.M, self.features, 1, 1).softmax(dim=1)
        return torch.sum(feats * vectors, dim=1)


@architecture
def sknet():
    return ResNet(conv_bn(3, 16), [SKUnit(16), conv_bn(16, 32, 1), SKUnit(32)], 32), images()


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(0.5 * torch.ones(dim))

    def forward(self, x):
        shortcut = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return shortcut + x


class LayerNorm2d(nn.Module):
    """Normalises over channels that come first; with weight and bias of its own."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 2, 2), LayerNorm2d(16))
        self.stage1 = nn.Sequential(ConvNeXtBlock(16), ConvNeXtBlock(16))
        self.down = nn.Sequential(LayerNorm2d(16), nn.Conv2d(16, 32, 2, 2))
        self.stage2 = ConvNeXtBlock(32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


@architecture
def convnext():
    return ConvNeXt(), images()


# ---- dense prediction and generation --------------------------------------------------------------------------------


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc1 = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16))
        self.enc2 = nn.Sequential(conv_bn(16, 24), conv_bn(24, 24))
        self.bottom = nn.Sequential(conv_bn(24, 32), conv_bn(32, 32))
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(32, 24, 2, stride=2)
        self.dec2 = nn.Sequential(conv_bn(48, 24), conv_bn(24, 24))
        self.up1 = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.dec1 = nn.Sequential(conv_bn(32, 16), conv_bn(16, 16))
        self.outc = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        e1 = self.enc1(x)
        e2 = self.enc2(self.pool(e1))
        b = self.bottom(self.pool(e2))
        d2 = self.dec2(torch.cat([e2, self.up2(b)], dim=1))
        d1 = self.dec1(torch.cat([e1, self.up1(d2)], dim=1))
        return self.outc(d1)


@architecture
def unet():
    return UNet(), images()


def conv_gn(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(4, c_out), nn.SiLU())


class UNetBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inc = conv_gn(3, 16)
        self.down1 = conv_gn(16, 24)
        self.down2 = conv_gn(24, 32)
        self.up1 = conv_gn(32 + 24, 24)
        self.up2 = conv_gn(24 + 16, 16)
        self.outc = nn.Conv2d(16, 1, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(F.avg_pool2d(x1, 2))
        x3 = self.down2(F.avg_pool2d(x2, 2))
        y = F.interpolate(x3, size=x2.shape[-2:], mode="bilinear", align_corners=False)
        y = self.up1(torch.cat([y, x2], 1))
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
        return self.outc(self.up2(torch.cat([y, x1], 1)))


@architecture
def unet_bilinear():
    return UNetBilinear(), images()


class Conv(nn.Module):
    def __init__(self, c1, c2, k=1, s=1):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1 = Conv(c, c, 3)
        self.cv2 = Conv(c, c, 3)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, c1, c2, n=1):
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(YoloBottleneck(self.c) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C3(nn.Module):
    def __init__(self, c1, c2):
        super().__init__()
        self.cv1 = Conv(c1, c2 // 2)
        self.cv2 = Conv(c1, c2 // 2)
        self.cv3 = Conv(c2, c2)
        self.m = YoloBottleneck(c2 // 2)

    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    def __init__(self, c1, c2, k=5):
        super().__init__()
        self.cv1 = Conv(c1, c1 // 2)
        self.cv2 = Conv(c1 * 2, c2)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x):
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Yolo(nn.Module):
    def __init__(self, classes=3, anchors=2):
        super().__init__()
        self.no = classes + 5
        self.na = anchors
        self.stem = Conv(3, 16, 3, 2)
        self.c1 = C2f(16, 16, 2)
        self.down1 = Conv(16, 24, 3, 2)
        self.c2 = C3(24, 24)
        self.sppf = SPPF(24, 32)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.neck = C3(32 + 16, 24)
        self.down2 = Conv(24, 24, 3, 2)
        self.pan = C2f(24 + 32, 32)
        self.heads = nn.ModuleList(nn.Conv2d(c, self.na * self.no, 1) for c in (24, 32))

    def forward(self, x):
        p1 = self.c1(self.stem(x))
        p2 = self.sppf(self.c2(self.down1(p1)))
        n1 = self.neck(torch.cat([self.up(p2), p1], 1))
        n2 = self.pan(torch.cat([self.down2(n1), p2], 1))
        outs = []
        for head, feature in zip(self.heads, (n1, n2), strict=True):
            y = head(feature)
            b, _, h, w = y.shape
            outs.append(y.view(b, self.na, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous())
        return tuple(outs)


@architecture
def yolo():
    return Yolo(), images(32)


class FPN(nn.Module):
    def __init__(self):
        super().__init__()
        self.c2 = conv_bn(3, 16, 3, 2)
        self.c3 = BasicBlock(16, 24, 2)
        self.c4 = BasicBlock(24, 32, 2)
        self.lateral = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in (16, 24, 32)])
        self.smooth = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
        self.cls = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x):
        c2 = self.c2(x)
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        p4 = self.lateral[2](c4)
        p3 = self.lateral[1](c3) + F.interpolate(p4, scale_factor=2.0, mode="nearest")
        p2 = self.lateral[0](c2) + F.interpolate(p3, scale_factor=2.0, mode="nearest")
        return [self.cls(F.relu(conv(p))) for conv, p in zip(self.smooth, (p2, p3, p4), strict=True)]


@architecture
def fpn():
    return FPN(), images(32)


class SuperResolution(nn.Module):
    def __init__(self, scale=2, width=24):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, width, 3, padding=1))
            for _ in range(2)
        )
        self.upsample = nn.Sequential(nn.Conv2d(width, 16 * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.PReLU())
        self.tail = nn.Conv2d(16, 3 * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x):
        first = x = self.head(x)
        for block in self.body:
            x = x + 0.1 * block(x)
        return self.shuffle(self.tail(self.upsample(x + first)))


@architecture
def pixel_shuffle():
    return SuperResolution(), images()


class Generator(nn.Module):
    def __init__(self, latent=16, width=32):
        super().__init__()
        self.width = width
        self.project = nn.Linear(latent, width * 4 * 4)
        self.bn0 = nn.BatchNorm2d(width)
        self.main = nn.Sequential(
            nn.ConvTranspose2d(width, 24, 4, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(True),
            nn.ConvTranspose2d(24, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
            nn.ConvTranspose2d(16, 3, 3, 1, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        x = self.project(z).view(z.shape[0], self.width, 4, 4)
        return self.main(F.relu(self.bn0(x)))


@architecture
def generator():
    return Generator(), (torch.randn(2, 16),)


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 24, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(24 * 4 * 4, 20),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(20, 24 * 4 * 4), nn.LeakyReLU(0.2), nn.Unflatten(1, (24, 4, 4)),
            nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        return self.decoder(self.encoder(x))


@architecture
def autoencoder():
    return AutoEncoder(), images(16, 1)


@architecture
def conv3d():
    model = nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(16, 24, 3, padding=1), nn.BatchNorm3d(24), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    return model, (torch.randn(2, 1, 8, 8, 8),)


# ---- vision transformers and mixers ---------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch=4):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class FusedAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class TimmAttention(nn.Module):
    """Fused projection with a norm on each head's queries and keys, after ``timm.layers.Attention``."""

    def __init__(self, dim, num_heads, fused_attn=True):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused_attn
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim)
        return self.proj(x)


class SeparateAttention(nn.Module):
    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.causal = causal
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        B, T, _ = x.shape
        S = memory.shape[1]
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(memory).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(memory).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out = out.transpose(1, 2).contiguous().view(B, T, self.heads * self.head_dim)
        return self.out_proj(out)


class MLP(nn.Module):
    def __init__(self, dim, hidden, act=nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dim * 2)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, dim, blocks, class_token=True):
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 16 + int(class_token), dim))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        x = x[:, 0] if self.cls_token is not None else x.mean(1)
        return self.head(x)


@architecture
def vit_fused():
    return ViT(32, [Block(32, FusedAttention(32, 4)) for _ in range(2)]), images()


@architecture
def timm_style():
    return ViT(48, [Block(48, TimmAttention(48, 3)), Block(48, TimmAttention(48, 3, fused_attn=False))]), images()


@architecture
def vit_sdpa():
    return ViT(32, [Block(32, SeparateAttention(32, 4)) for _ in range(2)], class_token=False), images()


@architecture
def vit_encoder_layer():
    layers = [
        nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True) for _ in range(2)
    ]
    return ViT(32, layers), images()


def window_partition(x, window):
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, C)


def window_reverse(windows, window, H, W):
    B = int(windows.shape[0] / (H * W / window / window))
    x = windows.view(B, H // window, W // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    def __init__(self, dim, window, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.window = window
        self.relative_position_bias_table = nn.Parameter(0.1 * torch.randn((2 * window - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", relative[:, :, 0] * (2 * window - 1) + relative[:, :, 1])
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        x = (attn.softmax(-1) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class SwinBlock(nn.Module):
    def __init__(self, dim, num_heads, size, window, shift):
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 2 * dim)
        mask = None
        if shift:
            region = torch.zeros(1, size, size, 1)
            cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for i, rows in enumerate(cuts):
                for j, columns in enumerate(cuts):
                    region[:, rows, columns] = 3 * i + j
            flat = window_partition(region, window).view(-1, window * window)
            mask = (flat[:, None] - flat[:, :, None]).ne(0).float() * -100.0
        self.register_buffer("attn_mask", mask)

    def forward(self, x):
        H = W = self.size
        B, L, C = x.shape
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.window).view(-1, self.window * self.window, C)
        windows = self.attn(windows, mask=self.attn_mask).view(-1, self.window, self.window, C)
        x = window_reverse(windows, self.window, H, W)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim, size):
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        B, L, C = x.shape
        x = x.view(B, self.size, self.size, C)
        x0 = x[:, 0::2, 0::2, :]
        x1 = x[:, 1::2, 0::2, :]
        x2 = x[:, 0::2, 1::2, :]
        x3 = x[:, 1::2, 1::2, :]
        x = torch.cat([x0, x1, x2, x3], -1).view(B, -1, 4 * C)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed(24, 2)
        self.layers = nn.Sequential(SwinBlock(24, 3, 8, 4, 0), SwinBlock(24, 3, 8, 4, 2), PatchMerging(24, 8),
                                    SwinBlock(48, 6, 4, 4, 0))  # fmt: skip
        self.norm = nn.LayerNorm(48)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = self.norm(self.layers(self.patch_embed(x)))
        x = self.avgpool(x.transpose(1, 2))
        return self.head(torch.flatten(x, 1))


@architecture
def swin():
    return Swin(), images()


class ConvAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads

        def projection(stride):
            conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1))

        self.q, self.k, self.v = projection(1), projection(2), projection(2)
        self.proj = nn.Conv2d(dim, dim, 1)

    def split_heads(self, x):
        b, c, h, w = x.shape
        return x.view(b, self.num_heads, self.head_dim, h * w).transpose(2, 3)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.split_heads(self.q(x)), self.split_heads(self.k(x)), self.split_heads(self.v(x))
        attn = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)
        out = torch.matmul(F.softmax(attn, dim=-1), v)
        out = out.transpose(2, 3).reshape(b, c, h, w)
        return x + self.proj(out)


class CvT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 3, 2, 1)
        self.attn1 = ConvAttention(24, 3)
        self.mlp = nn.Sequential(nn.BatchNorm2d(24), nn.Conv2d(24, 48, 1), nn.GELU(), nn.Conv2d(48, 24, 1))
        self.merge = nn.Conv2d(24, 32, 3, 2, 1)
        self.attn2 = ConvAttention(32, 4)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.attn1(self.embed(x))
        x = x + self.mlp(x)
        return self.head(self.attn2(self.merge(x)).mean(dim=(2, 3)))


@architecture
def cvt():
    return CvT(), images()


class MixerBlock(nn.Module):
    def __init__(self, dim, patches):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mix = MLP(patches, 24)
        self.norm2 = nn.LayerNorm(dim)
        self.channel_mix = MLP(dim, 64)

    def forward(self, x):
        y = self.norm1(x).transpose(1, 2)
        x = x + self.token_mix(y).transpose(1, 2)
        return x + self.channel_mix(self.norm2(x))


@architecture
def mlp_mixer():
    return ViT(32, [MixerBlock(32, 16), MixerBlock(32, 16)], class_token=False), images()


class GMLPBlock(nn.Module):
    def __init__(self, dim, hidden, patches):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj_in = nn.Linear(dim, hidden)
        self.gate_norm = nn.LayerNorm(hidden // 2)
        self.spatial = nn.Conv1d(patches, patches, 1)
        self.proj_out = nn.Linear(hidden // 2, dim)

    def forward(self, x):
        u, v = F.gelu(self.proj_in(self.norm(x))).chunk(2, dim=-1)
        return x + self.proj_out(u * self.spatial(self.gate_norm(v)))


@architecture
def gmlp():
    return ViT(24, [GMLPBlock(24, 64, 16), GMLPBlock(24, 64, 16)], class_token=False), images()


class EinsumAttention(nn.Module):
    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.wq = nn.Parameter(torch.randn(dim, heads, head_dim) / math.sqrt(dim))
        self.wk = nn.Parameter(torch.randn(dim, heads, head_dim) / math.sqrt(dim))
        self.wv = nn.Parameter(torch.randn(dim, heads, head_dim) / math.sqrt(dim))
        self.wo = nn.Parameter(torch.randn(heads, head_dim, dim) / math.sqrt(dim))
        self.scale = head_dim**-0.5

    def forward(self, x):
        q = torch.einsum("btd,dhk->bhtk", x, self.wq)
        k = torch.einsum("btd,dhk->bhtk", x, self.wk)
        v = torch.einsum("btd,dhk->bhtk", x, self.wv)
        weights = torch.einsum("bhqk,bhsk->bhqs", q, k).mul(self.scale).softmax(-1)
        heads = torch.einsum("bhqs,bhsk->bhqk", weights, v)
        return torch.einsum("bhqk,hkd->bqd", heads, self.wo)


@architecture
def einsum_attention():
    return ViT(32, [Block(32, EinsumAttention(32, 4, 6)) for _ in range(2)]), images()


class Perceiver(nn.Module):
    def __init__(self, dim=32, latents=6):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.embed = nn.Linear(12, dim)
        self.cross = SeparateAttention(dim, 4)
        self.norm_q = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(dim)
        self.process = nn.ModuleList([Block(dim, SeparateAttention(dim, 2)) for _ in range(2)])
        self.head = nn.Linear(dim, 7)

    def forward(self, x):
        z = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        z = z + self.cross(self.norm_q(z), self.norm_kv(self.embed(x)))
        for block in self.process:
            z = block(z)
        return self.head(z.mean(dim=1))


@architecture
def perceiver():
    return Perceiver(), (torch.randn(2, 14, 12),)


# ---- language and sequences -----------------------------------------------------------------------------------------


class GRUTagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.rnn = nn.GRU(24, 20, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(40, 9)

    def forward(self, ids):
        states, _ = self.rnn(self.embedding(ids))
        return self.out(states)


@architecture
def gru_tagger():
    return GRUTagger(), tokens()


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 5)

    def forward(self, ids):
        out, (_, _) = self.lstm(self.embedding(ids))
        return self.fc(self.norm(out[:, -1, :]))


@architecture
def lstm_classifier():
    return LSTMClassifier(), tokens()


class LSTMCellLoop(nn.Module):
    def __init__(self, inputs=12, hidden=20):
        super().__init__()
        self.hidden_size = hidden
        self.i2h = nn.Linear(inputs, 4 * hidden)
        self.h2h = nn.Linear(hidden, 4 * hidden)
        self.readout = nn.Linear(hidden, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.hidden_size)
        c = torch.zeros_like(h)
        for t in range(x.shape[1]):
            i, f, g, o = (self.i2h(x[:, t]) + self.h2h(h)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.readout(h)


@architecture
def lstm_cell_loop():
    return LSTMCellLoop(), (torch.randn(2, 6, 12),)


class TorchTransformer(nn.Module):
    def __init__(self, dim=32, length=8):
        super().__init__()
        self.source = nn.Embedding(40, dim)
        self.target = nn.Embedding(40, dim)
        self.position = nn.Parameter(torch.randn(length, dim))
        self.transformer = nn.Transformer(dim, 4, 1, 1, 48, batch_first=True)
        self.generator = nn.Linear(dim, 40)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        source, target = self.source(source) + self.position, self.target(target) + self.position
        out = self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)
        return self.generator(out)


@architecture
def torch_transformer():
    return TorchTransformer(), tokens() + tokens()


class DecoderBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = SeparateAttention(dim, heads, causal=True)
        self.cross_attn = SeparateAttention(dim, heads)
        self.mlp = MLP(dim, 64, nn.ReLU)

    def forward(self, x, memory):
        x = self.norm1(x + self.self_attn(x))
        x = self.norm2(x + self.cross_attn(x, memory))
        return self.norm3(x + self.mlp(x))


class Seq2Seq(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.embed = nn.Embedding(40, dim)
        self.encoder = nn.ModuleList([Block(dim, SeparateAttention(dim, 3)) for _ in range(2)])
        self.decoder = nn.ModuleList([DecoderBlock(dim, 2) for _ in range(2)])
        self.lm_head = nn.Linear(dim, 40)

    def forward(self, source, target):
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.lm_head(x)


@architecture
def cross_attention():
    return Seq2Seq(), tokens(10) + tokens(8)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_pairs(x):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def repeat_kv(x, n_rep):
    if n_rep == 1:
        return x
    b, kv_heads, t, d = x.shape
    return x[:, :, None, :, :].expand(b, kv_heads, n_rep, t, d).reshape(b, kv_heads * n_rep, t, d)


class RotaryAttention(nn.Module):
    """Grouped queries with rotary positions; ``interleaved`` pairs neighbours, else the two halves of a head."""

    def __init__(self, dim, heads, kv_heads, head_dim, interleaved=False):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.n_rep = heads // kv_heads
        self.interleaved = interleaved
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim))

    def rotary(self, x):
        angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), self.inv_freq)
        if self.interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
            return x * angles.cos() + rotate_pairs(x) * angles.sin()
        emb = torch.cat((angles, angles), dim=-1)
        return x * emb.cos() + rotate_half(x) * emb.sin()

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q, k = self.rotary(q), self.rotary(k)
        k, v = repeat_kv(k, self.n_rep), repeat_kv(v, self.n_rep)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        mask = torch.full((T, T), float("-inf"), device=x.device).triu(1)
        out = F.softmax(scores + mask, dim=-1) @ v
        return self.o_proj(out.transpose(1, 2).contiguous().view(B, T, -1))


class MultiQueryAttention(nn.Module):
    """All heads share one key and one value, taken from a fused projection by ``split``."""

    def __init__(self, dim, heads):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = dim, heads, dim // heads
        self.c_attn = nn.Linear(dim, dim + 2 * self.head_dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).split((self.embed_dim, self.head_dim, self.head_dim), dim=2)
        q = q.view(B, T, self.num_heads, self.head_dim).permute(0, 2, 1, 3)
        scores = torch.matmul(q, k.unsqueeze(1).transpose(-1, -2)) / self.head_dim**0.5
        causal = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x.device))
        scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
        out = torch.matmul(scores.softmax(dim=-1), v.unsqueeze(1))
        return self.c_proj(out.permute(0, 2, 1, 3).reshape(B, T, self.embed_dim))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    def __init__(self, dim, hidden, experts=3):
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.experts = nn.ModuleList([MLP(dim, hidden) for _ in range(experts)])

    def forward(self, x):
        weights = F.softmax(self.router(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (weights.unsqueeze(-1) * outputs).sum(dim=-2)


class LMBlock(nn.Module):
    def __init__(self, dim, attention, feed_forward):
        super().__init__()
        self.input_norm = RMSNorm(dim)
        self.attn = attention
        self.post_norm = RMSNorm(dim)
        self.ffn = feed_forward

    def forward(self, x):
        x = x + self.attn(self.input_norm(x))
        return x + self.ffn(self.post_norm(x))


class LanguageModel(nn.Module):
    def __init__(self, dim, blocks, tied=False, vocabulary=40):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


@architecture
def gqa_decoder():
    blocks = [LMBlock(32, RotaryAttention(32, 4, 2, 8), SwiGLU(32, 48)) for _ in range(2)]
    return LanguageModel(32, blocks), tokens()


@architecture
def gqa_interleaved():
    blocks = [LMBlock(24, RotaryAttention(24, 6, 2, 8, interleaved=True), SwiGLU(24, 40)) for _ in range(2)]
    return LanguageModel(24, blocks), tokens()


@architecture
def multi_query():
    return LanguageModel(32, [LMBlock(32, MultiQueryAttention(32, 4), MLP(32, 64)) for _ in range(2)]), tokens()


@architecture
def mixture_of_experts():
    blocks = [LMBlock(24, SeparateAttention(24, 3, causal=True), MixtureOfExperts(24, 32)) for _ in range(2)]
    return LanguageModel(24, blocks), tokens()


@architecture
def tied_lm():
    blocks = [LMBlock(32, RotaryAttention(32, 4, 4, 8), SwiGLU(32, 64))]
    return LanguageModel(32, blocks, tied=True), tokens()


class TemporalBlock(nn.Module):
    def __init__(self, c_in, c_out, dilation, k=3):
        super().__init__()
        self.padding = (k - 1) * dilation
        self.conv1 = nn.Conv1d(c_in, c_out, k, padding=self.padding, dilation=dilation)
        self.conv2 = nn.Conv1d(c_out, c_out, k, dilation=dilation)
        self.downsample = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x):
        out = F.relu(self.conv1(x)[:, :, : -self.padding].contiguous())
        out = F.relu(self.conv2(F.pad(out, (self.padding, 0))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(TemporalBlock(4, 16, 1), TemporalBlock(16, 24, 2), TemporalBlock(24, 24, 4))
        self.linear = nn.Linear(24, 6)

    def forward(self, x):
        return self.linear(self.network(x)[:, :, -1])


@architecture
def tcn():
    return TCN(), (torch.randn(2, 4, 16),)


class WaveNet(nn.Module):
    def __init__(self, residual=16, skip=20):
        super().__init__()
        self.start = nn.Conv1d(1, residual, 1)
        self.dilated = nn.ModuleList([nn.Conv1d(residual, 2 * residual, 2, dilation=2**i) for i in range(3)])
        self.residuals = nn.ModuleList([nn.Conv1d(residual, residual, 1) for _ in range(3)])
        self.skips = nn.ModuleList([nn.Conv1d(residual, skip, 1) for _ in range(3)])
        self.end1 = nn.Conv1d(skip, 24, 1)
        self.end2 = nn.Conv1d(24, 12, 1)

    def forward(self, x):
        x = self.start(x)
        total = 0
        for i in range(3):
            a, b = torch.chunk(self.dilated[i](F.pad(x, (2**i, 0))), 2, dim=1)
            z = torch.tanh(a) * torch.sigmoid(b)
            total = total + self.skips[i](z)
            x = x + self.residuals[i](z)
        return self.end2(F.relu(self.end1(F.relu(total))))


@architecture
def wavenet():
    return WaveNet(), (torch.randn(2, 1, 16),)


# ---- sets, graphs, pairs --------------------------------------------------------------------------------------------


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 24, 1)
        self.bn1 = nn.BatchNorm1d(24)
        self.conv2 = nn.Conv1d(24, 48, 1)
        self.bn2 = nn.BatchNorm1d(48)
        self.seg1 = nn.Conv1d(72, 32, 1)
        self.seg2 = nn.Conv1d(32, 4, 1)

    def forward(self, points):
        n = points.size(2)
        local = F.relu(self.bn1(self.conv1(points)))
        x = self.bn2(self.conv2(local))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 48, 1).repeat(1, 1, n)
        x = torch.cat([x, local], 1)
        return F.log_softmax(self.seg2(F.relu(self.seg1(x))), dim=1)


@architecture
def pointnet():
    return PointNet(), (torch.randn(2, 3, 14),)


class GraphLayer(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear = nn.Linear(c_in, c_out)
        self.root = nn.Linear(c_in, c_out, bias=False)

    def forward(self, x, adjacency):
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1.0)
        return self.linear(torch.bmm(adjacency, x) / degree) + self.root(x)


class GNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = GraphLayer(6, 24)
        self.second = GraphLayer(24, 24)
        self.norm = nn.BatchNorm1d(24)
        self.readout = nn.Linear(48, 3)

    def forward(self, x, adjacency):
        h = F.relu(self.first(x, adjacency))
        h = h + F.relu(self.norm(self.second(h, adjacency).transpose(1, 2)).transpose(1, 2))
        return self.readout(torch.cat([h.mean(1), h.max(1).values], dim=-1))


@architecture
def gnn():
    return GNN(), (torch.randn(2, 9, 6), torch.randint(0, 2, (2, 9, 9)).float())


class GATLayer(nn.Module):
    def __init__(self, c_in, heads, head_dim):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.lin = nn.Linear(c_in, heads * head_dim, bias=False)
        self.att_src = nn.Parameter(torch.randn(1, 1, heads, head_dim))
        self.att_dst = nn.Parameter(torch.randn(1, 1, heads, head_dim))

    def forward(self, x, adjacency):
        b, n, _ = x.shape
        h = self.lin(x).view(b, n, self.heads, self.head_dim)
        source = (h * self.att_src).sum(-1)
        target = (h * self.att_dst).sum(-1)
        scores = F.leaky_relu(source[:, None, :, :] + target[:, :, None, :], 0.2)
        scores = scores.masked_fill(adjacency[..., None] == 0, -1e9).softmax(dim=2)
        return torch.einsum("bijh,bjhd->bihd", scores, h).reshape(b, n, self.heads * self.head_dim)


class GAT(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = GATLayer(6, 4, 8)
        self.conv2 = GATLayer(32, 2, 12)
        self.out = nn.Linear(24, 3)

    def forward(self, x, adjacency):
        adjacency = adjacency + torch.eye(adjacency.shape[-1], device=x.device)
        return self.out(F.elu(self.conv2(F.elu(self.conv1(x, adjacency)), adjacency)))


@architecture
def gat():
    return GAT(), (torch.randn(2, 9, 6), torch.randint(0, 2, (2, 9, 9)).float())


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(1, 16), nn.MaxPool2d(2), conv_bn(16, 24), nn.AdaptiveAvgPool2d(2))
        self.embed = nn.Linear(24 * 2 * 2, 32)
        self.compare = nn.Linear(32, 1)

    def forward_once(self, x):
        x = self.trunk(x)
        return self.embed(x.reshape(x.size(0), -1))

    def forward(self, left, right):
        return torch.sigmoid(self.compare(torch.abs(self.forward_once(left) - self.forward_once(right))))


@architecture
def siamese():
    return Siamese(), images(16, 1) + images(16, 1)


class TwoTower(nn.Module):
    """An image and a text encoder that meet in one space, after CLIP."""

    def __init__(self, dim=20):
        super().__init__()
        self.visual = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 32, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.image_projection = nn.Linear(32, dim, bias=False)
        self.text = nn.Embedding(40, 24)
        self.block = Block(24, FusedAttention(24, 2))
        self.text_projection = nn.Parameter(torch.randn(24, dim) / math.sqrt(24))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image, ids):
        a = self.image_projection(self.visual(image))
        b = self.block(self.text(ids))[:, -1] @ self.text_projection
        a = a / a.norm(dim=-1, keepdim=True)
        b = F.normalize(b, dim=-1)
        return self.logit_scale.exp() * a @ b.t()


@architecture
def two_tower():
    return TwoTower(), images() + tokens()


class Highway(nn.Module):
    def __init__(self, dim=24, layers=2):
        super().__init__()
        self.start = nn.Linear(10, dim)
        self.transform = nn.ModuleList([nn.Linear(dim, dim) for _ in range(layers)])
        self.gate = nn.ModuleList([nn.Linear(dim, dim) for _ in range(layers)])
        self.out = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.start(x)
        for transform, gate in zip(self.transform, self.gate, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * F.relu(transform(x)) + (1 - t) * x
        return self.out(x)


@architecture
def highway():
    return Highway(), (torch.randn(2, 10),)
