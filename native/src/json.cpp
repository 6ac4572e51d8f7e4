#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <locale>
#include <numeric>
#include <sstream>

#include "checks.hpp"

namespace sec {
namespace json {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, uint32_t code) {
    const auto put = [&out](uint32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (code < 0x80) {
        put(code);
    } else if (code < 0x800) {
        put(0xc0 | (code >> 6));
        put(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        put(0xe0 | (code >> 12));
        put(0x80 | ((code >> 6) & 0x3f));
        put(0x80 | (code & 0x3f));
    } else {
        put(0xf0 | (code >> 18));
        put(0x80 | ((code >> 12) & 0x3f));
        put(0x80 | ((code >> 6) & 0x3f));
        put(0x80 | (code & 0x3f));
    }
}

// Puts an object's members in the order of their keys; false when two are equal.
bool sort_members(Value& value) {
    std::vector<size_t> order(value.keys.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&value](size_t a, size_t b) { return value.keys[a] < value.keys[b]; });
    std::vector<std::string> keys;
    std::vector<Value> items;
    keys.reserve(order.size());
    items.reserve(order.size());
    for (size_t i : order) {
        if (!keys.empty() && keys.back() == value.keys[i]) return false;
        keys.push_back(std::move(value.keys[i]));
        items.push_back(std::move(value.items[i]));
    }
    value.keys = std::move(keys);
    value.items = std::move(items);
    return true;
}

class Reader {
public:
    Reader(const char* text, size_t size, const std::string& what) : text_(text), size_(size), what_(what) {}

    Value document() {
        Value out;
        value(out, 0);
        space();
        if (at_ != size_) fail("text after the value");
        return out;
    }

private:
    [[noreturn]] void fail(const std::string& why) const {
        refuse(what_ + " is not valid JSON: " + why + " at byte " + std::to_string(at_));
    }
    // The end reads as a zero byte, which no JSON outside a string's escapes may contain.
    char peek() const { return at_ < size_ ? text_[at_] : '\0'; }

    void space() {
        while (at_ < size_ && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
            ++at_;
    }

    void word(const char* expected) {
        for (const char* c = expected; *c; ++c, ++at_)
            if (peek() != *c) fail(std::string("expected ") + expected);
    }

    void value(Value& out, int depth) {
        if (depth > kMaxDepth) fail("more than " + std::to_string(kMaxDepth) + " levels");
        if (++values_ > kMaxValues) fail("more than " + std::to_string(kMaxValues) + " values");
        space();
        switch (peek()) {
            case '{': return object(out, depth);
            case '[': return array(out, depth);
            case '"':
                out.kind = Kind::string;
                return string(out.text);
            case 't':
                word("true");
                out.kind = Kind::boolean;
                out.boolean = true;
                return;
            case 'f':
                word("false");
                out.kind = Kind::boolean;
                return;
            case 'n': return word("null");
            default: return number(out);
        }
    }

    void array(Value& out, int depth) {
        out.kind = Kind::array;
        ++at_;
        space();
        if (peek() == ']') {
            ++at_;
            return;
        }
        for (;;) {
            out.items.emplace_back();
            value(out.items.back(), depth + 1);
            space();
            const char c = peek();
            if (c != ',' && c != ']') fail("expected , or ]");
            ++at_;
            if (c == ']') return;
        }
    }

    void object(Value& out, int depth) {
        out.kind = Kind::object;
        ++at_;
        space();
        if (peek() == '}') {
            ++at_;
            return;
        }
        for (;;) {
            space();
            if (peek() != '"') fail("expected a key");
            out.keys.emplace_back();
            string(out.keys.back());
            space();
            word(":");
            out.items.emplace_back();
            value(out.items.back(), depth + 1);
            space();
            const char c = peek();
            if (c != ',' && c != '}') fail("expected , or }");
            ++at_;
            if (c == '}') break;
        }
        if (!sort_members(out)) fail("two equal keys in the object that ends");
    }

    uint32_t hex4() {
        uint32_t code = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            if (is_digit(c)) code = code * 16 + static_cast<uint32_t>(c - '0');
            else if (c >= 'a' && c <= 'f') code = code * 16 + static_cast<uint32_t>(c - 'a' + 10);
            else if (c >= 'A' && c <= 'F') code = code * 16 + static_cast<uint32_t>(c - 'A' + 10);
            else fail("expected four hexadecimal digits");
        }
        return code;
    }

    void unicode_escape(std::string& out) {
        uint32_t code = hex4();
        if (code >= 0xdc00 && code <= 0xdfff) fail("a low surrogate without its high one");
        if (code >= 0xd800 && code <= 0xdbff) {
            word("\\u");
            const uint32_t low = hex4();
            if (low < 0xdc00 || low > 0xdfff) fail("a high surrogate without its low one");
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        }
        append_utf8(out, code);
    }

    void escape(std::string& out) {
        const char c = peek();
        ++at_;
        switch (c) {
            case '"': case '\\': case '/': out += c; return;
            case 'b': out += '\b'; return;
            case 'f': out += '\f'; return;
            case 'n': out += '\n'; return;
            case 'r': out += '\r'; return;
            case 't': out += '\t'; return;
            case 'u': return unicode_escape(out);
            default: --at_; fail("unknown escape");
        }
    }

    void string(std::string& out) {
        ++at_;
        for (;;) {
            const size_t from = at_;
            while (at_ < size_ && text_[at_] != '"' && text_[at_] != '\\' &&
                   static_cast<unsigned char>(text_[at_]) >= 0x20)
                ++at_;
            out.append(text_ + from, at_ - from);
            if (at_ == size_) fail("a string without its end");
            const char c = text_[at_];
            if (c != '"' && c != '\\') fail("a control character in a string");
            ++at_;
            if (c == '"') break;
            escape(out);
        }
        if (!valid_utf8(out)) fail("a string that is not UTF-8 ends");
    }

    void digits() {
        if (!is_digit(peek())) fail("expected a value or a digit");
        while (is_digit(peek())) ++at_;
    }

    void number(Value& out) {
        out.kind = Kind::number;
        const size_t from = at_;
        if (peek() == '-') ++at_;
        if (peek() == '0') ++at_;
        else digits();
        bool whole = true;
        if (peek() == '.') {
            whole = false;
            ++at_;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            whole = false;
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        if (at_ - from > 400) fail("a number of more than 400 characters");
        const std::string digits_of(text_ + from, at_ - from);
        if (whole) read_integer(digits_of, out);
        read_double(digits_of, out);
    }

    static void read_integer(const std::string& digits_of, Value& out) {
        const bool negative = digits_of[0] == '-';
        // Counted downwards: the most negative int64 has no positive twin.
        constexpr int64_t low = std::numeric_limits<int64_t>::min();
        int64_t n = 0;
        for (size_t i = negative ? 1 : 0; i < digits_of.size(); ++i) {
            const int64_t digit = digits_of[i] - '0';
            if (n < low / 10 || n * 10 < low + digit) return;
            n = n * 10 - digit;
        }
        if (!negative && n == low) return;
        out.exact = true;
        out.integer = negative ? n : -n;
    }

    // A stream with the classic locale: strtod would read a decimal comma where the process asked for one.
    void read_double(const std::string& digits_of, Value& out) {
        if (out.exact) {
            out.number = static_cast<double>(out.integer);
            return;
        }
        std::istringstream stream(digits_of);
        stream.imbue(std::locale::classic());
        double d = 0;
        stream >> d;
        // A tiny number may set the fail bit and still be the right (denormal or zero) value; a huge one may not.
        if (!std::isfinite(d) || std::fabs(d) >= std::numeric_limits<double>::max())
            fail("a number past the range of a double ends");
        out.number = d;
    }

    const char* text_;
    size_t size_;
    const std::string& what_;
    size_t at_ = 0;
    size_t values_ = 0;
};

}  // namespace

const Value* Value::find(const std::string& key) const {
    const auto at = std::lower_bound(keys.begin(), keys.end(), key);
    if (at == keys.end() || *at != key) return nullptr;
    return &items[static_cast<size_t>(at - keys.begin())];
}

bool valid_utf8(const std::string& text) {
    const size_t size = text.size();
    for (size_t i = 0; i < size;) {
        const auto lead = static_cast<unsigned char>(text[i]);
        size_t more = 0;
        uint32_t code = lead, least = 0;
        if (lead < 0x80) { ++i; continue; }
        if (lead >= 0xc2 && lead <= 0xdf) { more = 1; code = lead & 0x1fu; least = 0x80; }
        else if (lead >= 0xe0 && lead <= 0xef) { more = 2; code = lead & 0x0fu; least = 0x800; }
        else if (lead >= 0xf0 && lead <= 0xf4) { more = 3; code = lead & 0x07u; least = 0x10000; }
        else return false;
        if (size - i <= more) return false;
        for (size_t k = 1; k <= more; ++k) {
            const auto c = static_cast<unsigned char>(text[i + k]);
            if ((c & 0xc0u) != 0x80u) return false;
            code = (code << 6) | (c & 0x3fu);
        }
        if (code < least || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return false;
        i += more + 1;
    }
    return true;
}

Value parse(const char* text, size_t size, const std::string& what) {
    if (size > kMaxBytes) refuse(what + " has more than " + std::to_string(kMaxBytes) + " bytes of JSON");
    return Reader(text, size, what).document();
}

}  // namespace json
}  // namespace sec
