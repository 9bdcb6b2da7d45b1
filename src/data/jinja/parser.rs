//! From tokens to the tree, by jinja2's grammar.

use std::collections::HashSet;
use std::sync::Arc;

use super::lexer::{Token, tokens};
use super::tree::*;
use super::{Failure, Outcome};

/// Nested expressions and blocks, and operators in a row, that a template has at most: bounds the stack.
const DEEPEST: usize = 50;
const LONGEST: usize = 400;

pub struct Parsed {
    pub body: Body,
    pub marks: bool,
}

pub fn parse(source: &str) -> Outcome<Parsed> {
    let mut parser =
        Parser { tokens: tokens(source)?, at: 0, depth: 0, loops: 0, marks: false, names: HashSet::new() };
    let (body, _) = parser.body(&[])?;
    Ok(Parsed { body, marks: parser.marks })
}

struct Parser {
    tokens: Vec<(usize, Token)>,
    at: usize,
    depth: usize,
    /// Loops around the statement, within its macro.
    loops: usize,
    marks: bool,
    /// The variables that the macro reads.
    names: HashSet<String>,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(_, token)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(line, _)| *line)
    }

    fn fail<T>(&self, message: impl std::fmt::Display) -> Outcome<T> {
        Err(Failure::at(self.line(), format!("syntax error: {message}")))
    }

    /// What stands here, for messages.
    fn found(&self) -> String {
        match self.peek() {
            None => "the end of the template".into(),
            Some(Token::Data(_)) => "text".into(),
            Some(Token::VariableBegin) => "'{{'".into(),
            Some(Token::VariableEnd) => "'}}'".into(),
            Some(Token::BlockBegin) => "'{%'".into(),
            Some(Token::BlockEnd) => "'%}'".into(),
            Some(Token::Name(name)) => format!("'{name}'"),
            Some(Token::Str(text)) => format!("the text {text:?}"),
            Some(Token::Int(n)) => n.to_string(),
            Some(Token::Float(x)) => x.to_string(),
            Some(Token::Op(op)) => format!("'{op}'"),
        }
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(self.peek(), Some(Token::Op(o)) if *o == op)
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(name)) if name == word)
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let is = self.is_op(op);
        self.at += usize::from(is);
        is
    }

    fn skip_word(&mut self, word: &str) -> bool {
        let is = self.is_word(word);
        self.at += usize::from(is);
        is
    }

    fn expect_op(&mut self, op: &str) -> Outcome<()> {
        if self.skip_op(op) {
            return Ok(());
        }
        self.fail(format!("expected '{op}', found {}", self.found()))
    }

    fn expect(&mut self, token: Token, what: &str) -> Outcome<()> {
        if self.peek() == Some(&token) {
            self.at += 1;
            return Ok(());
        }
        self.fail(format!("expected '{what}', found {}", self.found()))
    }

    fn name(&mut self) -> Outcome<Name> {
        if let Some(Token::Name(name)) = self.peek() {
            let name = Name::from(name.as_str());
            self.at += 1;
            return Ok(name);
        }
        self.fail(format!("expected a name, found {}", self.found()))
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        if self.depth >= DEEPEST {
            return self.fail(format!("more than {DEEPEST} blocks or brackets inside one another"));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    // ---- statements ----

    /// Statements up to one of the words, which is taken; and that word.
    fn body(&mut self, ends: &[&str]) -> Outcome<(Body, String)> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.peek() {
                None if ends.is_empty() => return Ok((body, String::new())),
                None => return self.fail(format!("the template ends before '{}'", ends.join("' or '"))),
                Some(Token::Data(text)) => {
                    let text = Kind::Text(Arc::from(text.as_str()));
                    self.at += 1;
                    text
                }
                Some(Token::VariableBegin) => {
                    self.at += 1;
                    let value = self.tuple(true, &[])?;
                    self.expect(Token::VariableEnd, "}}")?;
                    Kind::Print(vec![value])
                }
                _ => {
                    self.expect(Token::BlockBegin, "{%")?;
                    if let Some(end) = ends.iter().find(|end| self.is_word(end)) {
                        self.at += 1;
                        return Ok((body, end.to_string()));
                    }
                    let kind = self.deeper(Self::statement)?;
                    self.expect(Token::BlockEnd, "%}")?;
                    kind
                }
            };
            body.push(Statement { line, kind });
        }
    }

    /// [`Parser::body`] behind a tag, which ends here.
    fn block(&mut self, ends: &[&str]) -> Outcome<(Body, String)> {
        self.skip_op(":");
        self.expect(Token::BlockEnd, "%}")?;
        self.body(ends)
    }

    fn statement(&mut self) -> Outcome<Kind> {
        let tag = self.name()?;
        match &*tag {
            "if" => self.if_(),
            "for" => self.for_(),
            "set" => self.set(),
            "with" => self.with(),
            "macro" => self.macro_(),
            "call" => self.call_block(),
            "filter" => {
                let first = self.filter()?;
                let filters = self.filters(vec![first])?;
                Ok(Kind::FilterBlock(filters, self.block(&["endfilter"])?.0))
            }
            "generation" => {
                self.marks = true;
                let loops = std::mem::take(&mut self.loops);
                let body = self.block(&["endgeneration"])?.0;
                self.loops = loops;
                Ok(Kind::Generation(body))
            }
            "print" => {
                let mut values = Vec::new();
                while self.peek() != Some(&Token::BlockEnd) {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    values.push(self.expression()?);
                }
                Ok(Kind::Print(values))
            }
            "break" | "continue" if self.loops == 0 => self.fail(format!("'{tag}' outside of a loop")),
            "break" => Ok(Kind::Break),
            "continue" => Ok(Kind::Continue),
            "include" | "extends" | "import" | "from" | "block" | "autoescape" => {
                self.fail(format!("the statement '{tag}' is not supported in a chat template"))
            }
            _ => self.fail(format!("unknown tag '{tag}'")),
        }
    }

    fn if_(&mut self) -> Outcome<Kind> {
        let (mut branches, mut otherwise) = (Vec::new(), Vec::new());
        loop {
            let condition = self.tuple(false, &[])?;
            let (body, end) = self.block(&["elif", "else", "endif"])?;
            branches.push((condition, body));
            match end.as_str() {
                "elif" => continue,
                "else" => otherwise = self.block(&["endif"])?.0,
                _ => {}
            }
            return Ok(Kind::If(branches, otherwise));
        }
    }

    fn for_(&mut self) -> Outcome<Kind> {
        let target = self.target(&["in"], false)?;
        if !self.skip_word("in") {
            return self.fail(format!("expected 'in', found {}", self.found()));
        }
        let over = self.tuple(false, &["recursive"])?;
        let condition = if self.skip_word("if") { Some(self.expression()?) } else { None };
        if self.is_word("recursive") {
            return self.fail("a recursive loop is not supported; write a macro");
        }
        self.loops += 1;
        let (body, end) = self.block(&["endfor", "else"])?;
        self.loops -= 1;
        let otherwise = if end == "else" { self.block(&["endfor"])?.0 } else { Vec::new() };
        Ok(Kind::For(Box::new(For { target, over, condition, body, otherwise })))
    }

    fn set(&mut self) -> Outcome<Kind> {
        let target = self.target(&[], true)?;
        if self.skip_op("=") {
            return Ok(Kind::Set(target, self.tuple(true, &[])?));
        }
        let filters = self.filters(Vec::new())?;
        Ok(Kind::SetBlock(target, filters, self.block(&["endset"])?.0))
    }

    fn with(&mut self) -> Outcome<Kind> {
        let mut values = Vec::new();
        while self.peek() != Some(&Token::BlockEnd) {
            if !values.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.target(&[], false)?;
            self.expect_op("=")?;
            values.push((target, self.expression()?));
        }
        Ok(Kind::With(values, self.block(&["endwith"])?.0))
    }

    fn macro_(&mut self) -> Outcome<Kind> {
        let name = self.name()?;
        let (params, defaults) = self.signature()?;
        Ok(Kind::Macro(Arc::new(self.macro_body(name, params, defaults, "endmacro")?)))
    }

    fn macro_body(
        &mut self,
        name: Name,
        params: Vec<Name>,
        defaults: Vec<Expr>,
        end: &str,
    ) -> Outcome<Macro> {
        let loops = std::mem::take(&mut self.loops);
        let outside = std::mem::take(&mut self.names);
        let body = self.block(&[end])?.0;
        let reads = |names: &HashSet<String>, what: &str| names.contains(what);
        let names = &self.names;
        let [varargs, kwargs, caller] = ["varargs", "kwargs", "caller"].map(|what| reads(names, what));
        self.names.extend(outside);
        self.loops = loops;
        Ok(Macro { name, params, defaults, body, varargs, kwargs, caller })
    }

    fn signature(&mut self) -> Outcome<(Vec<Name>, Vec<Expr>)> {
        let (mut params, mut defaults) = (Vec::new(), Vec::new());
        self.expect_op("(")?;
        while !self.is_op(")") {
            if !params.is_empty() {
                self.expect_op(",")?;
            }
            params.push(self.name()?);
            if self.skip_op("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.fail("a parameter without a default after one with a default");
            }
        }
        self.expect_op(")")?;
        Ok((params, defaults))
    }

    fn call_block(&mut self) -> Outcome<Kind> {
        let (params, defaults) = if self.is_op("(") { self.signature()? } else { Default::default() };
        let Expr::Call(call) = self.expression()? else { return self.fail("expected a call") };
        let body = Arc::new(self.macro_body(Name::from("caller"), params, defaults, "endcall")?);
        Ok(Kind::Call(Box::new(CallBlock { call, body })))
    }

    fn target(&mut self, ends: &[&str], namespace: bool) -> Outcome<Target> {
        let mut targets = Vec::new();
        loop {
            let ended = ends.iter().any(|end| self.is_word(end)) || self.is_op(")");
            if ended && !targets.is_empty() {
                return Ok(Target::Tuple(targets));
            }
            let target = self.deeper(|p| p.one_target(namespace))?;
            if !self.skip_op(",") {
                if targets.is_empty() {
                    return Ok(target);
                }
                targets.push(target);
                return Ok(Target::Tuple(targets));
            }
            targets.push(target);
        }
    }

    fn one_target(&mut self, namespace: bool) -> Outcome<Target> {
        if self.skip_op("(") {
            let target = self.target(&[], namespace)?;
            self.expect_op(")")?;
            return Ok(target);
        }
        let name = self.name()?;
        if ["true", "false", "True", "False", "none", "None"].contains(&&*name) {
            return self.fail(format!("cannot assign to '{name}'"));
        }
        if self.is_op(".") && namespace {
            self.at += 1;
            self.names.insert(name.to_string());
            return Ok(Target::Attribute(name, self.name()?));
        }
        Ok(Target::Name(name))
    }

    // ---- expressions ----

    /// An expression, or several with commas.
    fn tuple(&mut self, conditional: bool, ends: &[&str]) -> Outcome<Expr> {
        let mut items = Vec::new();
        loop {
            let at_end = matches!(self.peek(), Some(Token::VariableEnd | Token::BlockEnd))
                || self.is_op(")")
                || ends.iter().any(|end| self.is_word(end));
            if at_end && !items.is_empty() {
                return Ok(Expr::Tuple(items));
            }
            let item = if conditional { self.expression()? } else { self.deeper(Self::or)? };
            if !self.skip_op(",") {
                if items.is_empty() {
                    return Ok(item);
                }
                items.push(item);
                return Ok(Expr::Tuple(items));
            }
            items.push(item);
        }
    }

    pub fn expression(&mut self) -> Outcome<Expr> {
        self.deeper(|p| {
            let line = p.line();
            let mut value = p.or()?;
            while p.skip_word("if") {
                let condition = p.or()?;
                let otherwise = if p.skip_word("else") { Some(Box::new(p.expression()?)) } else { None };
                value = Expr::If(Box::new([condition, value]), otherwise, line);
            }
            Ok(value)
        })
    }

    /// `operand (operator operand)*`, from the left.
    fn chain(
        &mut self,
        operand: fn(&mut Self) -> Outcome<Expr>,
        operator: impl Fn(&mut Self) -> Option<fn(Box<Expr>, Box<Expr>) -> Expr>,
    ) -> Outcome<Expr> {
        let mut left = operand(self)?;
        let mut count = 0;
        while let Some(join) = operator(self) {
            count += 1;
            if count > LONGEST {
                return self.fail(format!("more than {LONGEST} operators in a row"));
            }
            left = join(Box::new(left), Box::new(operand(self)?));
        }
        Ok(left)
    }

    fn or(&mut self) -> Outcome<Expr> {
        self.chain(Self::and, |p| p.skip_word("or").then_some(Expr::Or as _))
    }

    fn and(&mut self) -> Outcome<Expr> {
        self.chain(Self::not, |p| p.skip_word("and").then_some(Expr::And as _))
    }

    fn not(&mut self) -> Outcome<Expr> {
        if self.skip_word("not") {
            return Ok(Expr::Not(Box::new(self.deeper(Self::not)?)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Outcome<Expr> {
        use Comparison::*;
        let first = self.sum()?;
        let mut more = Vec::new();
        loop {
            let known = [("==", Eq), ("!=", Ne), ("<=", Le), (">=", Ge), ("<", Lt), (">", Gt)];
            let not_in = matches!(self.tokens.get(self.at + 1), Some((_, Token::Name(name))) if name == "in");
            let comparison = if let Some((_, c)) = known.into_iter().find(|(op, _)| self.skip_op(op)) {
                c
            } else if self.skip_word("in") {
                In
            } else if self.is_word("not") && not_in {
                self.at += 2;
                NotIn
            } else if more.is_empty() {
                return Ok(first);
            } else {
                return Ok(Expr::Compare(Box::new(first), more));
            };
            more.push((comparison, self.sum()?));
        }
    }

    fn sum(&mut self) -> Outcome<Expr> {
        self.chain(Self::concat, |p| {
            if p.skip_op("+") {
                Some(|a, b| Expr::Binary(Operator::Add, a, b))
            } else if p.skip_op("-") {
                Some(|a, b| Expr::Binary(Operator::Sub, a, b))
            } else {
                None
            }
        })
    }

    fn concat(&mut self) -> Outcome<Expr> {
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        Ok(Expr::Concat(parts))
    }

    fn product(&mut self) -> Outcome<Expr> {
        self.chain(Self::power, |p| {
            if p.skip_op("*") {
                Some(|a, b| Expr::Binary(Operator::Mul, a, b))
            } else if p.skip_op("/") {
                Some(|a, b| Expr::Binary(Operator::Div, a, b))
            } else if p.skip_op("//") {
                Some(|a, b| Expr::Binary(Operator::FloorDiv, a, b))
            } else if p.skip_op("%") {
                Some(|a, b| Expr::Binary(Operator::Mod, a, b))
            } else {
                None
            }
        })
    }

    fn power(&mut self) -> Outcome<Expr> {
        self.chain(|p| p.unary(true), |p| p.skip_op("**").then_some(|a, b| Expr::Binary(Operator::Pow, a, b)))
    }

    fn unary(&mut self, with_filter: bool) -> Outcome<Expr> {
        let node = if self.skip_op("-") {
            Expr::Negative(Box::new(self.deeper(|p| p.unary(false))?))
        } else if self.skip_op("+") {
            Expr::Positive(Box::new(self.deeper(|p| p.unary(false))?))
        } else {
            self.primary()?
        };
        let mut node = self.postfix(node)?;
        if !with_filter {
            return Ok(node);
        }
        for _ in 0..LONGEST {
            if self.skip_op("|") {
                let filter = self.filter()?;
                node = Expr::Filter(Box::new(node), Box::new(filter));
            } else if self.skip_word("is") {
                node = self.test(node)?;
            } else if self.is_op("(") {
                node = Expr::Call(Call { callee: Box::new(node), args: self.arguments()? });
            } else {
                return Ok(node);
            }
        }
        self.fail(format!("more than {LONGEST} filters in a row"))
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let Some(token) = self.peek().cloned() else { return self.fail("expected an expression") };
        match token {
            Token::Name(name) => {
                self.at += 1;
                Ok(match name.as_str() {
                    "true" | "True" => Expr::Bool(true),
                    "false" | "False" => Expr::Bool(false),
                    "none" | "None" => Expr::None,
                    _ => {
                        let shared = Name::from(name.as_str());
                        self.names.insert(name);
                        Expr::Name(shared)
                    }
                })
            }
            Token::Str(mut text) => {
                self.at += 1;
                while let Some(Token::Str(more)) = self.peek() {
                    text += more;
                    self.at += 1;
                }
                Ok(Expr::Str(text.into()))
            }
            Token::Int(n) => {
                self.at += 1;
                Ok(Expr::Int(n))
            }
            Token::Float(x) => {
                self.at += 1;
                Ok(Expr::Float(x))
            }
            Token::Op("(") => {
                self.at += 1;
                let value = if self.is_op(")") { Expr::Tuple(Vec::new()) } else { self.tuple(true, &[])? };
                self.expect_op(")")?;
                Ok(value)
            }
            Token::Op("[") => {
                self.at += 1;
                let items = self.items("]", Self::expression)?;
                Ok(Expr::List(items))
            }
            Token::Op("{") => {
                self.at += 1;
                let pair = |p: &mut Self| -> Outcome<(Expr, Expr)> {
                    let key = p.expression()?;
                    p.expect_op(":")?;
                    Ok((key, p.expression()?))
                };
                Ok(Expr::Dict(self.items("}", pair)?))
            }
            _ => self.fail(format!("expected an expression, found {}", self.found())),
        }
    }

    /// Items with commas between them, up to the bracket, which is taken.
    fn items<T>(&mut self, end: &str, item: impl Fn(&mut Self) -> Outcome<T>) -> Outcome<Vec<T>> {
        let mut items = Vec::new();
        while !self.is_op(end) {
            if !items.is_empty() {
                self.expect_op(",")?;
                if self.is_op(end) {
                    break;
                }
            }
            items.push(item(self)?);
        }
        self.expect_op(end)?;
        Ok(items)
    }

    fn postfix(&mut self, mut node: Expr) -> Outcome<Expr> {
        for _ in 0..LONGEST {
            if self.skip_op(".") {
                node = match self.peek() {
                    Some(Token::Int(n)) => {
                        let index = Expr::Int(*n);
                        self.at += 1;
                        Expr::Item(Box::new(node), Box::new(index))
                    }
                    _ => Expr::Attribute(Box::new(node), self.name()?),
                };
            } else if self.skip_op("[") {
                node = self.subscript(node)?;
            } else if self.is_op("(") {
                node = Expr::Call(Call { callee: Box::new(node), args: self.arguments()? });
            } else {
                return Ok(node);
            }
        }
        self.fail(format!("more than {LONGEST} accesses in a row"))
    }

    fn subscript(&mut self, node: Expr) -> Outcome<Expr> {
        let mut parts = [const { None::<Expr> }; 3];
        let mut colons = 0;
        loop {
            if self.skip_op(":") {
                colons += 1;
                if colons > 2 {
                    return self.fail("a slice has at most two colons");
                }
            } else if self.is_op("]") && (colons > 0 || parts[0].is_some())
                || self.is_op(",") && colons == 0 && parts[0].is_some()
            {
                break;
            } else if parts[colons].is_some() {
                return self.fail(format!("expected ']', found {}", self.found()));
            } else {
                parts[colons] = Some(self.expression()?);
            }
        }
        if colons == 0 && self.is_op(",") {
            let mut items: Vec<Expr> = parts[0].take().into_iter().collect();
            while self.skip_op(",") {
                if self.is_op("]") {
                    break;
                }
                items.push(self.expression()?);
            }
            parts[0] = Some(Expr::Tuple(items));
        }
        self.expect_op("]")?;
        Ok(match (colons, parts) {
            (0, [Some(index), ..]) => Expr::Item(Box::new(node), Box::new(index)),
            (_, parts) => Expr::Slice(Box::new(node), Box::new(parts)),
        })
    }

    fn arguments(&mut self) -> Outcome<Arguments> {
        let mut args = Arguments::default();
        self.expect_op("(")?;
        let mut first = true;
        while !self.is_op(")") {
            if !std::mem::take(&mut first) {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            let named = matches!(
                (self.peek(), self.tokens.get(self.at + 1)),
                (Some(Token::Name(_)), Some((_, Token::Op("="))))
            );
            let after_all = args.map.is_some();
            let misplaced = after_all || !named && (args.list.is_some() || !args.named.is_empty());
            if self.skip_op("**") {
                if after_all {
                    return self.fail("two '**' in one call");
                }
                args.map = Some(Box::new(self.expression()?));
            } else if self.skip_op("*") {
                if after_all || args.list.is_some() {
                    return self.fail("two '*' in one call, or '*' after '**'");
                }
                args.list = Some(Box::new(self.expression()?));
            } else if misplaced {
                return self.fail("a positional argument after named ones");
            } else if named {
                let name = self.name()?;
                self.expect_op("=")?;
                args.named.push((name, self.expression()?));
            } else {
                args.positional.push(self.expression()?);
            }
        }
        self.expect_op(")")?;
        Ok(args)
    }

    fn dotted(&mut self) -> Outcome<Name> {
        let mut name = self.name()?.to_string();
        while self.skip_op(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name.into())
    }

    fn filter(&mut self) -> Outcome<Filter> {
        let name = self.dotted()?;
        let args = if self.is_op("(") { self.arguments()? } else { Arguments::default() };
        Ok(Filter { name, args })
    }

    fn filters(&mut self, mut filters: Vec<Filter>) -> Outcome<Vec<Filter>> {
        while self.skip_op("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    /// What follows `is`.
    fn test(&mut self, node: Expr) -> Outcome<Expr> {
        let negated = self.skip_word("not");
        let name = self.dotted()?;
        let mut args = Arguments::default();
        let has_argument = match self.peek() {
            Some(Token::Op("(")) => {
                args = self.arguments()?;
                false
            }
            Some(Token::Name(name)) if name == "is" => return self.fail("tests with 'is' cannot be chained"),
            Some(Token::Name(name)) => !["else", "or", "and"].contains(&name.as_str()),
            Some(Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{")) => true,
            _ => false,
        };
        if has_argument {
            let argument = self.deeper(|p| {
                let primary = p.primary()?;
                p.postfix(primary)
            })?;
            args.positional.push(argument);
        }
        let test = Expr::Test(Box::new(node), Box::new(Filter { name, args }));
        Ok(if negated { Expr::Not(Box::new(test)) } else { test })
    }
}
