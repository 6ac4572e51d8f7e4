// Turns a graph into steps, layout by layout, inserting packing where layouts meet.
#pragma once
#include "plain.hpp"
#include "prepared.hpp"

namespace sec {

class Builder {
public:
    Builder(const Graph& graph, int64_t batch, const Machine& machine, const Tuning& tuning, int64_t limit, int arenas,
            const Mapping* file);
    std::unique_ptr<Prepared> build();

private:
    struct Buffer {
        int64_t floats = 0;
        bool owned = true;                          // in the arena; else a constant, an input or an output
        int first = -1, last = -1;                  // steps
        int64_t place = 0;
    };
    static size_t at(int v) { return static_cast<size_t>(v); }
    const Shape& shape(int v) const { return out_->shapes[at(v)]; }
    Slot slot(int v) const { return lay_.slot[at(v)]; }
    std::string here() const;

    int new_buffer(int64_t floats, bool owned);
    Ref plain(int value);                           // the value as a row-major array, packed out if needed
    Ref new_plain(int value);
    Form image(int value, int64_t rows);
    Form tokens(int value);
    Form single(int value);
    Form lanes(int value, Slot slot, int64_t rows);
    Form new_lanes(int value);                      // in the slot that the layouts chose
    bool in_place(const Form& res, int value, int residual) const;
    const Form* any_lanes(int value) const;
    void pack(int value, const Form& form);
    void alias(int value, const Form& form);

    void add(std::unique_ptr<Step> step, const std::vector<Ref>& reads, const std::vector<Ref>& writes);
    void node(int index);
    void plain_node(const Node& n);
    void product(const Node& n);
    ProductSpec spec_of(const Node& n);
    void find_absorbed();
    void lifetimes();
    void pool(const Node& n);
    void mean(const Node& n);
    void plain_mean(const Node& n);
    void binary(const Node& n);
    void unary(const Node& n);
    void affine(const Node& n);
    void norm(const Node& n);
    void softmax(const Node& n);
    bool attention(const Node& n);
    void concat(const Node& n);
    void slice(const Node& n);
    void reshape(const Node& n);
    void constant(const Node& n);
    void outputs();
    void place_buffers();
    void make_arenas(int64_t floats, const std::vector<size_t>& placed);

    const Graph& g_;
    Machine machine_;
    const Tuning& tuning_;
    int64_t limit_;
    int arenas_;
    const Mapping* file_;                           // where the weights lie; null when they are the caller's
    Layouts lay_;
    std::unique_ptr<Prepared> out_;
    std::vector<Buffer> buffers_;
    std::vector<Ref> plain_;
    std::vector<std::vector<Form>> forms_;
    std::vector<int> output_buffer_;                // by value, -1 when it is no output
    std::vector<int> absorbs_;                      // by node: the convolution whose output it only adds, or -1
    std::vector<bool> absorbed_;                    // by node
    std::vector<int> last_reader_;                  // by value: a node, or past all nodes for an output
    int current_ = -1;
};

}  // namespace sec
