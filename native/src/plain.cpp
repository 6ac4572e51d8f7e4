#include "plain.hpp"

#include "plain_base.hpp"

namespace sec {

std::unique_ptr<PlainOp> make_plain(const Node& node, const Graph& graph, const std::vector<Shape>& in,
                                    const std::vector<Shape>& out, const Kernels& kernels) {
    const plain::Make make{node, graph, in, out, kernels};
    switch (node.op) {
        case Op::conv: return plain::make_conv(make);
        case Op::linear: return plain::make_linear(make);
        case Op::binary: return plain::make_binary(make);
        case Op::unary: return plain::make_unary(make);
        case Op::affine: return plain::make_affine(make);
        case Op::softmax: return plain::make_softmax(make);
        case Op::max_pool: case Op::avg_pool: return plain::make_pool(make);
        case Op::adaptive_avg_pool: return plain::make_adaptive(make);
        case Op::reduce: return plain::make_reduce(make);
        case Op::layer_norm: case Op::rms_norm: case Op::group_norm: return plain::make_norm(make);
        case Op::matmul: return plain::make_matmul(make);
        case Op::attention: return plain::make_attention(make);
        case Op::embedding: return plain::make_embedding(make);
        case Op::concat: return plain::make_concat(make);
        case Op::slice: return plain::make_slice(make);
        case Op::reshape: return plain::make_reshape(make);
        case Op::permute: return plain::make_permute(make);
        case Op::expand: return plain::make_expand(make);
        case Op::pad: return plain::make_pad(make);
        case Op::lstm: case Op::gru: return plain::make_recurrent(make);
        case Op::constant: break;
    }
    throw Error(SEC_ERROR_INTERNAL, "a constant is an array, not something to run");
}

}  // namespace sec
