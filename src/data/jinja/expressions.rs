//! Expressions of a template, by jinja2's grammar: what binds loosest first.

use super::RenderResult;
use super::lexer::Token;
use super::parser::{LONGEST, Parser};
use super::tree::*;

impl Parser {
    /// An expression, or several with commas.
    pub(super) fn tuple(&mut self, conditional: bool, ends: &[&str]) -> RenderResult<Expr> {
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

    pub(super) fn expression(&mut self) -> RenderResult<Expr> {
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
        operand: fn(&mut Self) -> RenderResult<Expr>,
        operator: impl Fn(&mut Self) -> Option<fn(Box<Expr>, Box<Expr>) -> Expr>,
    ) -> RenderResult<Expr> {
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

    pub(super) fn or(&mut self) -> RenderResult<Expr> {
        self.chain(Self::and, |p| p.skip_word("or").then_some(Expr::Or as _))
    }

    fn and(&mut self) -> RenderResult<Expr> {
        self.chain(Self::not, |p| p.skip_word("and").then_some(Expr::And as _))
    }

    fn not(&mut self) -> RenderResult<Expr> {
        if self.skip_word("not") {
            return Ok(Expr::Not(Box::new(self.deeper(Self::not)?)));
        }
        self.compare()
    }

    fn compare(&mut self) -> RenderResult<Expr> {
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

    fn sum(&mut self) -> RenderResult<Expr> {
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

    fn concat(&mut self) -> RenderResult<Expr> {
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

    fn product(&mut self) -> RenderResult<Expr> {
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

    fn power(&mut self) -> RenderResult<Expr> {
        self.chain(|p| p.unary(true), |p| p.skip_op("**").then_some(|a, b| Expr::Binary(Operator::Pow, a, b)))
    }

    fn unary(&mut self, with_filter: bool) -> RenderResult<Expr> {
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

    fn primary(&mut self) -> RenderResult<Expr> {
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
                let pair = |p: &mut Self| -> RenderResult<(Expr, Expr)> {
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
    fn items<T>(&mut self, end: &str, item: impl Fn(&mut Self) -> RenderResult<T>) -> RenderResult<Vec<T>> {
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

    fn postfix(&mut self, mut node: Expr) -> RenderResult<Expr> {
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

    fn subscript(&mut self, node: Expr) -> RenderResult<Expr> {
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

    fn arguments(&mut self) -> RenderResult<Arguments> {
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

    fn dotted(&mut self) -> RenderResult<Name> {
        let mut name = self.name()?.to_string();
        while self.skip_op(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name.into())
    }

    pub(super) fn filter(&mut self) -> RenderResult<Filter> {
        let name = self.dotted()?;
        let args = if self.is_op("(") { self.arguments()? } else { Arguments::default() };
        Ok(Filter { name, args })
    }

    pub(super) fn filters(&mut self, mut filters: Vec<Filter>) -> RenderResult<Vec<Filter>> {
        while self.skip_op("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    /// What follows `is`.
    fn test(&mut self, node: Expr) -> RenderResult<Expr> {
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
