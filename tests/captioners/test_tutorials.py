"""Captioners in the style of three public tutorials, written as their authors write them and not for captionfix, each
wrapped in at most five lines.

Only sizes are smaller than the tutorials': ResNet-18 and few units, so that the tests are quick.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision.models as models
import torchvision.transforms as transforms
from PIL import Image
from torch.nn.utils.rnn import pack_padded_sequence

import captionfix

WORDS = ["a", "dog", "cat", "man", "woman", "red", "ball", "runs", "sits", "on", "the", "grass", "with", "two", "park"]


# a pair; the image is the first token; outputs are packed (as pytorch-tutorial's image captioning) --------------------


class EncoderCNN(nn.Module):
    def __init__(self, embed_size):
        """Load the ResNet and replace the top fc layer."""
        super().__init__()
        resnet = models.resnet18(weights=None)
        modules = list(resnet.children())[:-1]  # delete the last fc layer.
        self.resnet = nn.Sequential(*modules)
        self.linear = nn.Linear(resnet.fc.in_features, embed_size)
        self.bn = nn.BatchNorm1d(embed_size, momentum=0.01)

    def forward(self, images):
        """Extract feature vectors from input images."""
        with torch.no_grad():
            features = self.resnet(images)
        features = features.reshape(features.size(0), -1)
        features = self.bn(self.linear(features))
        return features


class DecoderRNN(nn.Module):
    def __init__(self, embed_size, hidden_size, vocab_size, num_layers, max_seq_length=20):
        """Set the hyper-parameters and build the layers."""
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.max_seg_length = max_seq_length

    def forward(self, features, captions, lengths):
        """Decode image feature vectors and generates captions."""
        embeddings = self.embed(captions)
        embeddings = torch.cat((features.unsqueeze(1), embeddings), 1)
        packed = pack_padded_sequence(embeddings, lengths, batch_first=True)
        hiddens, _ = self.lstm(packed)
        outputs = self.linear(hiddens[0])
        return outputs

    def sample(self, features, states=None):
        """Generate captions for given image features using greedy search."""
        sampled_ids = []
        inputs = features.unsqueeze(1)
        for _ in range(self.max_seg_length):
            hiddens, states = self.lstm(inputs, states)  # hiddens: (batch_size, 1, hidden_size)
            outputs = self.linear(hiddens.squeeze(1))  # outputs:  (batch_size, vocab_size)
            _, predicted = outputs.max(1)  # predicted: (batch_size)
            sampled_ids.append(predicted)
            inputs = self.embed(predicted)  # inputs: (batch_size, embed_size)
            inputs = inputs.unsqueeze(1)  # inputs: (batch_size, 1, embed_size)
        sampled_ids = torch.stack(sampled_ids, 1)  # sampled_ids: (batch_size, max_seq_length)
        return sampled_ids


class Vocabulary:
    """Simple vocabulary wrapper."""

    def __init__(self):
        self.word2idx = {}
        self.idx2word = {}
        self.idx = 0

    def add_word(self, word):
        if word not in self.word2idx:
            self.word2idx[word] = self.idx
            self.idx2word[self.idx] = word
            self.idx += 1

    def __call__(self, word):
        if word not in self.word2idx:
            return self.word2idx["<unk>"]
        return self.word2idx[word]

    def __len__(self):
        return len(self.word2idx)


def vocab_of(special):
    vocab = Vocabulary()
    for word in [*special, *WORDS]:
        vocab.add_word(word)
    return vocab


# attention; captions sorted by length; predictions sliced in (as a-PyTorch-Tutorial-to-Image-Captioning) --------------


class Encoder(nn.Module):
    """Encoder."""

    def __init__(self, encoded_image_size=14):
        super().__init__()
        self.enc_image_size = encoded_image_size
        resnet = models.resnet18(weights=None)
        # Remove linear and pool layers (since we're not doing classification)
        modules = list(resnet.children())[:-2]
        self.resnet = nn.Sequential(*modules)
        # Resize image to fixed size to allow input images of variable size
        self.adaptive_pool = nn.AdaptiveAvgPool2d((encoded_image_size, encoded_image_size))
        self.fine_tune()

    def forward(self, images):
        out = self.resnet(images)  # (batch_size, 2048, image_size/32, image_size/32)
        out = self.adaptive_pool(out)  # (batch_size, 2048, encoded_image_size, encoded_image_size)
        out = out.permute(0, 2, 3, 1)  # (batch_size, encoded_image_size, encoded_image_size, 2048)
        return out

    def fine_tune(self, fine_tune=True):
        for p in self.resnet.parameters():
            p.requires_grad = False
        for c in list(self.resnet.children())[5:]:
            for p in c.parameters():
                p.requires_grad = fine_tune


class Attention(nn.Module):
    """Attention Network."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)  # linear layer to transform encoded image
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)  # linear layer to transform decoder's output
        self.full_att = nn.Linear(attention_dim, 1)  # linear layer to calculate values to be softmax-ed
        self.relu = nn.ReLU()
        self.softmax = nn.Softmax(dim=1)  # softmax layer to calculate weights

    def forward(self, encoder_out, decoder_hidden):
        att1 = self.encoder_att(encoder_out)  # (batch_size, num_pixels, attention_dim)
        att2 = self.decoder_att(decoder_hidden)  # (batch_size, attention_dim)
        att = self.full_att(self.relu(att1 + att2.unsqueeze(1))).squeeze(2)  # (batch_size, num_pixels)
        alpha = self.softmax(att)  # (batch_size, num_pixels)
        attention_weighted_encoding = (encoder_out * alpha.unsqueeze(2)).sum(dim=1)  # (batch_size, encoder_dim)
        return attention_weighted_encoding, alpha


class DecoderWithAttention(nn.Module):
    """Decoder."""

    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim=512, dropout=0.5):
        super().__init__()
        self.encoder_dim = encoder_dim
        self.vocab_size = vocab_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)  # attention network
        self.embedding = nn.Embedding(vocab_size, embed_dim)  # embedding layer
        self.dropout = nn.Dropout(p=dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim, bias=True)  # decoding LSTMCell
        self.init_h = nn.Linear(encoder_dim, decoder_dim)  # linear layer to find initial hidden state of LSTMCell
        self.init_c = nn.Linear(encoder_dim, decoder_dim)  # linear layer to find initial cell state of LSTMCell
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)  # linear layer to create a sigmoid-activated gate
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(decoder_dim, vocab_size)  # linear layer to find scores over vocabulary

    def init_hidden_state(self, encoder_out):
        mean_encoder_out = encoder_out.mean(dim=1)
        h = self.init_h(mean_encoder_out)  # (batch_size, decoder_dim)
        c = self.init_c(mean_encoder_out)
        return h, c

    def forward(self, encoder_out, encoded_captions, caption_lengths):
        batch_size = encoder_out.size(0)
        encoder_dim = encoder_out.size(-1)
        vocab_size = self.vocab_size

        # Flatten image
        encoder_out = encoder_out.view(batch_size, -1, encoder_dim)  # (batch_size, num_pixels, encoder_dim)
        num_pixels = encoder_out.size(1)

        # Sort input data by decreasing lengths; why? apparent below
        caption_lengths, sort_ind = caption_lengths.squeeze(1).sort(dim=0, descending=True)
        encoder_out = encoder_out[sort_ind]
        encoded_captions = encoded_captions[sort_ind]

        # Embedding
        embeddings = self.embedding(encoded_captions)  # (batch_size, max_caption_length, embed_dim)

        # Initialize LSTM state
        h, c = self.init_hidden_state(encoder_out)  # (batch_size, decoder_dim)

        # We won't decode at the <end> position, since we've finished generating as soon as we generate <end>
        # So, decoding lengths are actual lengths - 1
        decode_lengths = (caption_lengths - 1).tolist()

        # Create tensors to hold word predicion scores and alphas
        predictions = torch.zeros(batch_size, max(decode_lengths), vocab_size)
        alphas = torch.zeros(batch_size, max(decode_lengths), num_pixels)

        for t in range(max(decode_lengths)):
            batch_size_t = sum([length > t for length in decode_lengths])
            attention_weighted_encoding, alpha = self.attention(encoder_out[:batch_size_t], h[:batch_size_t])
            gate = self.sigmoid(self.f_beta(h[:batch_size_t]))  # gating scalar, (batch_size_t, encoder_dim)
            attention_weighted_encoding = gate * attention_weighted_encoding
            h, c = self.decode_step(
                torch.cat([embeddings[:batch_size_t, t, :], attention_weighted_encoding], dim=1),
                (h[:batch_size_t], c[:batch_size_t]),
            )  # (batch_size_t, decoder_dim)
            preds = self.fc(self.dropout(h))  # (batch_size_t, vocab_size)
            predictions[:batch_size_t, t, :] = preds
            alphas[:batch_size_t, t, :] = alpha

        return predictions, encoded_captions, decode_lengths, alphas, sort_ind


# the last word is cut off inside; `sample` begins with a zero state (as the Udacity project's decoders) ---------------


class UdacityEncoder(nn.Module):
    def __init__(self, embed_size):
        super().__init__()
        resnet = models.resnet18(weights=None)
        for param in resnet.parameters():
            param.requires_grad_(False)

        modules = list(resnet.children())[:-1]
        self.resnet = nn.Sequential(*modules)
        self.embed = nn.Linear(resnet.fc.in_features, embed_size)

    def forward(self, images):
        features = self.resnet(images)
        features = features.view(features.size(0), -1)
        features = self.embed(features)
        return features


class UdacityDecoder(nn.Module):
    def __init__(self, embed_size, hidden_size, vocab_size, num_layers=1):
        super().__init__()
        self.hidden_size = hidden_size
        self.word_embeddings = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.hidden2vocab = nn.Linear(hidden_size, vocab_size)

    def init_hidden(self, batch_size):
        return (torch.zeros((1, batch_size, self.hidden_size)), torch.zeros((1, batch_size, self.hidden_size)))

    def forward(self, features, captions):
        captions = captions[:, :-1]
        self.hidden = self.init_hidden(features.shape[0])
        embeddings = self.word_embeddings(captions)
        embeddings = torch.cat((features.unsqueeze(1), embeddings), dim=1)
        lstm_out, self.hidden = self.lstm(embeddings, self.hidden)
        outputs = self.hidden2vocab(lstm_out)
        return outputs

    def sample(self, inputs, states=None, max_len=20):
        """accepts pre-processed image tensor (inputs) and returns predicted sentence"""
        output = []
        hidden = self.init_hidden(inputs.shape[0])
        while True:
            lstm_out, hidden = self.lstm(inputs, hidden)
            outputs = self.hidden2vocab(lstm_out)
            outputs = outputs.squeeze(1)
            _, max_indice = torch.max(outputs, dim=1)
            output.append(max_indice.cpu().numpy()[0].item())
            if max_indice == 1 or len(output) >= max_len:
                break  # <end> is predicted
            inputs = self.word_embeddings(max_indice)
            inputs = inputs.unsqueeze(1)
        return output


# ---------------------------------------------------------------------------------------------------------------------

transform = transforms.Compose(
    [
        transforms.Resize((64, 64)),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


@pytest.fixture(autouse=True)
def _seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def photograph():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def predicts_start(decoder, start):
    """As training does: after the image comes the start word, whatever the image."""
    with torch.no_grad():
        head = decoder.linear if hasattr(decoder, "linear") else decoder.hidden2vocab
        embed = decoder.embed if hasattr(decoder, "embed") else decoder.word_embeddings
        embed.weight[:, 0] = 8.0  # a unit that knows a word from an image: images have nothing there
        lstm = decoder.lstm
        hidden = lstm.hidden_size
        for gate in (0, 2, 3):  # input gate, candidate and output gate of unit 0 follow it
            lstm.weight_ih_l0[gate * hidden] = 0
            lstm.weight_hh_l0[gate * hidden] = 0
            lstm.weight_ih_l0[gate * hidden, 0] = 8.0
        head.weight[start] = 0
        head.weight[start, 0] = -50.0
        head.bias[start] = 5.0


def explained(captioner, photograph):
    result = captionfix.explain(captioner, photograph, caption="a red ball", method="joined")
    for word in result:
        credits = sum(share for _, share in word.language)
        assert word.image_share + credits + word.other == pytest.approx(1, abs=1e-4)
        assert word.image_share > 0
        assert word.fixations[:, 2].sum() == pytest.approx(1, abs=1e-4)
        assert (word.fixations[:, 0] < 120).all()
        assert (word.fixations[:, 1] < 90).all()
    return result


def test_pair_with_packed_outputs(photograph):
    vocab = vocab_of(["<pad>", "<start>", "<end>", "<unk>"])
    encoder = EncoderCNN(24).eval()
    decoder = DecoderRNN(24, 32, len(vocab), 1).eval()
    predicts_start(decoder, vocab("<start>"))
    with torch.no_grad():
        encoder.bn.weight[0] = 0

    captioner = captionfix.wrap((encoder, decoder), vocab, transform, own=lambda x: decoder.sample(encoder(x)))

    assert captioner.recognised.first == 1
    assert "encoder.resnet.7" in str(captioner.recognised)
    pixels = captioner.prepare(photograph).pixels[None]
    tokens = torch.tensor([[1, 4, 9, 10]])
    with torch.no_grad():
        wanted = decoder(encoder(pixels), tokens, [5])[1:]  # one caption packed is one row a step, the image's first
        torch.testing.assert_close(captioner.logits(pixels, tokens)[0], wanted)
    assert captioner.encode(pixels).shape == (1, 512, 2, 2)
    explained(captioner, photograph)


def test_attention_decoder_with_lengths(photograph):
    word_map = {word: i for i, word in enumerate(["<pad>", *WORDS, "<unk>", "<start>", "<end>"])}
    encoder = Encoder(14).eval()
    decoder = DecoderWithAttention(20, 24, 32, len(word_map)).eval()

    captioner = captionfix.wrap((encoder, decoder), word_map, transform)

    assert captioner.recognised.first == 0
    pixels = captioner.prepare(photograph).pixels[None]
    ids = [word_map[w] for w in ("<start>", "a", "red", "ball", "<end>")]
    with torch.no_grad():
        wanted, *_ = decoder(encoder(pixels), torch.tensor([ids]), torch.tensor([[5]]))
        torch.testing.assert_close(captioner.logits(pixels, torch.tensor([ids[:-1]])), wanted)
    assert captioner.encode(pixels).shape == (1, 512, 14, 14)
    with torch.no_grad():
        weights = captioner.attention(captioner.encode(pixels), torch.tensor([ids[:-1]]))
        *_, alphas, _ = decoder(encoder(pixels), torch.tensor([ids]), torch.tensor([[5]]))
        torch.testing.assert_close(weights.flatten(2), alphas)
    explained(captioner, photograph)


def test_decoder_that_cuts_the_last_word_off(photograph):
    vocab = vocab_of(["<start>", "<end>", "<unk>"])
    encoder = UdacityEncoder(24)
    decoder = UdacityDecoder(24, 32, len(vocab))
    predicts_start(decoder, vocab("<start>"))
    with torch.no_grad():
        encoder.embed.weight[0] = encoder.embed.bias[0] = 0

    own = lambda images: decoder.sample(encoder(images).unsqueeze(1))  # noqa: E731
    captioner = captionfix.wrap((encoder, decoder), vocab, transform, own=own)

    assert captioner.recognised.first == 1
    assert encoder.training  # it was so before
    assert not hasattr(decoder, "hidden")
    pixels = captioner.prepare(photograph).pixels[None]
    encoder.eval()
    with torch.no_grad():
        wanted = decoder(encoder(pixels), torch.tensor([[0, 3, 8, 9, 1]]))[:, 1:]
        torch.testing.assert_close(captioner.logits(pixels, torch.tensor([[0, 3, 8, 9]])), wanted)
    explained(captioner, photograph)
