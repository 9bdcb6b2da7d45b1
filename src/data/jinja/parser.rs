//! From tokens to the tree, by jinja2's grammar.

use std::collections::HashSet;
use std::sync::Arc;

use super::lexer::{Token, tokens};
use super::tree::*;
use super::{Failure, RenderResult};

/// Nested expressions and blocks, and operators in a row, that a template has at most: bounds the stack.
const DEEPEST: usize = 50;
pub(super) const LONGEST: usize = 400;

pub struct Parsed {
    pub body: Body,
    pub marks: bool,
}

pub fn parse(source: &str) -> RenderResult<Parsed> {
    let mut parser =
        Parser { tokens: tokens(source)?, at: 0, depth: 0, loops: 0, marks: false, names: HashSet::new() };
    let (body, _) = parser.body(&[])?;
    Ok(Parsed { body, marks: parser.marks })
}

pub(super) struct Parser {
    pub(super) tokens: Vec<(usize, Token)>,
    pub(super) at: usize,
    depth: usize,
    /// Loops around the statement, within its macro.
    loops: usize,
    marks: bool,
    /// The variables that the macro reads.
    pub(super) names: HashSet<String>,
}

impl Parser {
    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(_, token)| token)
    }

    pub(super) fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(line, _)| *line)
    }

    pub(super) fn fail<T>(&self, message: impl std::fmt::Display) -> RenderResult<T> {
        Err(Failure::at(self.line(), format!("syntax error: {message}")))
    }

    /// What stands here, for messages.
    pub(super) fn found(&self) -> String {
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

    pub(super) fn is_op(&self, op: &str) -> bool {
        matches!(self.peek(), Some(Token::Op(o)) if *o == op)
    }

    pub(super) fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(name)) if name == word)
    }

    pub(super) fn skip_op(&mut self, op: &str) -> bool {
        let is = self.is_op(op);
        self.at += usize::from(is);
        is
    }

    pub(super) fn skip_word(&mut self, word: &str) -> bool {
        let is = self.is_word(word);
        self.at += usize::from(is);
        is
    }

    pub(super) fn expect_op(&mut self, op: &str) -> RenderResult<()> {
        if self.skip_op(op) {
            return Ok(());
        }
        self.fail(format!("expected '{op}', found {}", self.found()))
    }

    fn expect(&mut self, token: Token, what: &str) -> RenderResult<()> {
        if self.peek() == Some(&token) {
            self.at += 1;
            return Ok(());
        }
        self.fail(format!("expected '{what}', found {}", self.found()))
    }

    pub(super) fn name(&mut self) -> RenderResult<Name> {
        if let Some(Token::Name(name)) = self.peek() {
            let name = Name::from(name.as_str());
            self.at += 1;
            return Ok(name);
        }
        self.fail(format!("expected a name, found {}", self.found()))
    }

    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> RenderResult<T>) -> RenderResult<T> {
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
    fn body(&mut self, ends: &[&str]) -> RenderResult<(Body, String)> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.peek() {
                None if ends.is_empty() => return Ok((body, String::new())),
                None => return self.fail(format!("the template ends before '{}'", ends.join("' or '"))),
                Some(Token::Data(text)) => {
                    let text = NodeKind::Text(Arc::from(text.as_str()));
                    self.at += 1;
                    text
                }
                Some(Token::VariableBegin) => {
                    self.at += 1;
                    let value = self.tuple(true, &[])?;
                    self.expect(Token::VariableEnd, "}}")?;
                    NodeKind::Print(vec![value])
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
    fn block(&mut self, ends: &[&str]) -> RenderResult<(Body, String)> {
        self.skip_op(":");
        self.expect(Token::BlockEnd, "%}")?;
        self.body(ends)
    }

    fn statement(&mut self) -> RenderResult<NodeKind> {
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
                Ok(NodeKind::FilterBlock(filters, self.block(&["endfilter"])?.0))
            }
            "generation" => {
                self.marks = true;
                let loops = std::mem::take(&mut self.loops);
                let body = self.block(&["endgeneration"])?.0;
                self.loops = loops;
                Ok(NodeKind::Generation(body))
            }
            "print" => {
                let mut values = Vec::new();
                while self.peek() != Some(&Token::BlockEnd) {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    values.push(self.expression()?);
                }
                Ok(NodeKind::Print(values))
            }
            "break" | "continue" if self.loops == 0 => self.fail(format!("'{tag}' outside of a loop")),
            "break" => Ok(NodeKind::Break),
            "continue" => Ok(NodeKind::Continue),
            "include" | "extends" | "import" | "from" | "block" | "autoescape" => {
                self.fail(format!("the statement '{tag}' is not supported in a chat template"))
            }
            _ => self.fail(format!("unknown tag '{tag}'")),
        }
    }

    fn if_(&mut self) -> RenderResult<NodeKind> {
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
            return Ok(NodeKind::If(branches, otherwise));
        }
    }

    fn for_(&mut self) -> RenderResult<NodeKind> {
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
        Ok(NodeKind::For(Box::new(For { target, over, condition, body, otherwise })))
    }

    fn set(&mut self) -> RenderResult<NodeKind> {
        let target = self.target(&[], true)?;
        if self.skip_op("=") {
            return Ok(NodeKind::Set(target, self.tuple(true, &[])?));
        }
        let filters = self.filters(Vec::new())?;
        Ok(NodeKind::SetBlock(target, filters, self.block(&["endset"])?.0))
    }

    fn with(&mut self) -> RenderResult<NodeKind> {
        let mut values = Vec::new();
        while self.peek() != Some(&Token::BlockEnd) {
            if !values.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.target(&[], false)?;
            self.expect_op("=")?;
            values.push((target, self.expression()?));
        }
        Ok(NodeKind::With(values, self.block(&["endwith"])?.0))
    }

    fn macro_(&mut self) -> RenderResult<NodeKind> {
        let name = self.name()?;
        let (params, defaults) = self.signature()?;
        Ok(NodeKind::Macro(Arc::new(self.macro_body(name, params, defaults, "endmacro")?)))
    }

    fn macro_body(
        &mut self,
        name: Name,
        params: Vec<Name>,
        defaults: Vec<Expr>,
        end: &str,
    ) -> RenderResult<Macro> {
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

    fn signature(&mut self) -> RenderResult<(Vec<Name>, Vec<Expr>)> {
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

    fn call_block(&mut self) -> RenderResult<NodeKind> {
        let (params, defaults) = if self.is_op("(") { self.signature()? } else { Default::default() };
        let Expr::Call(call) = self.expression()? else { return self.fail("expected a call") };
        let body = Arc::new(self.macro_body(Name::from("caller"), params, defaults, "endcall")?);
        Ok(NodeKind::Call(Box::new(CallBlock { call, body })))
    }

    fn target(&mut self, ends: &[&str], namespace: bool) -> RenderResult<AssignTarget> {
        let mut targets = Vec::new();
        loop {
            let ended = ends.iter().any(|end| self.is_word(end)) || self.is_op(")");
            if ended && !targets.is_empty() {
                return Ok(AssignTarget::Tuple(targets));
            }
            let target = self.deeper(|p| p.one_target(namespace))?;
            if !self.skip_op(",") {
                if targets.is_empty() {
                    return Ok(target);
                }
                targets.push(target);
                return Ok(AssignTarget::Tuple(targets));
            }
            targets.push(target);
        }
    }

    fn one_target(&mut self, namespace: bool) -> RenderResult<AssignTarget> {
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
            return Ok(AssignTarget::Attribute(name, self.name()?));
        }
        Ok(AssignTarget::Name(name))
    }
}
